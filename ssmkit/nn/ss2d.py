"""SS2D, VMamba's mixer of images: four selective scans along rows and columns, forwards and backwards, added up.

Liu et al. 2024, "VMamba", arXiv:2401.10166, section 4.2 and figure 3. Arguments, parameter names and initialisation are
those of the published code, so its state dicts load.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._path_scans import PathScans, init_dt_projs
from ssmkit.ops import cross_selective_scan
from ssmkit.paths import ScanPath, column, cross, row

NPATHS = 4


def _unidirectional(height: int, width: int) -> tuple[ScanPath, ...]:
    return (row(height, width),) * NPATHS


def _bidirectional(height: int, width: int) -> tuple[ScanPath, ...]:
    rows = row(height, width)
    return rows, rows, rows.flip(), rows.flip()


def _turned(height: int, width: int) -> tuple[ScanPath, ...]:
    """Rows of the image turned by 0, 90, 180 and 270 degrees."""
    columns = column(height, width, corner="top right"), column(height, width, corner="bottom left")
    return row(height, width), columns[0], row(height, width).flip(), columns[1]


# The four paths of each kind of scan; "cascade" is two scans of two paths each, see SS2D.scan.
SCANS: dict[str, Callable[[int, int], tuple[ScanPath, ...]] | None] = {
    "cross": cross,
    "unidirectional": _unidirectional,
    "bidirectional": _bidirectional,
    "turned": _turned,
    "cascade": None,
}
GATES = ("activated", "linear", None)
OUT_NORMS = ("layer norm", "convolution", "layer norm and convolution", "softmax", "sigmoid", None)

# The published names of the forward types: what they scan, and whether they do so in fp32.
_OFFICIAL = {
    **dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v2"), ("cross", True)),
    **dict.fromkeys(("v04", "v05", "v3"), ("cross", False)),
    **dict.fromkeys(("v051d", "v31d"), ("unidirectional", False)),
    **dict.fromkeys(("v052d", "v32d"), ("bidirectional", False)),
    **dict.fromkeys(("v052dc", "v32dc"), ("cascade", False)),
    "v052d3": ("turned", False),
}
_OFFICIAL_OUT_NORMS = {
    "none": None,
    "dwconv3": "convolution",
    "cnorm": "layer norm and convolution",
    "softmax": "softmax",
    "sigmoid": "sigmoid",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardType:
    """What VMamba's code calls a forward type, in words.

    Args:
        scan: Where the four paths run. "cross": rows and columns, forwards and backwards. "unidirectional": rows, four
            times. "bidirectional": rows twice, and twice backwards. "turned": rows of the image turned by quarters.
            "cascade": each row on its own, then each column.
        gate: Multiply by the activation of a second half of in_proj ("activated"), by that half itself ("linear"), or
            not at all (None).
        out_norm: What follows the sum of the scans: "layer norm" over the channels, a depthwise "convolution" of 3 x 3,
            "layer norm and convolution", "softmax" over the positions, "sigmoid", or None.
        out_act: Apply GELU after out_norm.
        fp32: Scan in fp32 also where the tokens have fewer bits; the states are always kept in fp32.
    """

    scan: str = "cross"
    gate: str | None = "activated"
    out_norm: str | None = "layer norm"
    out_act: bool = False
    fp32: bool = False

    def __post_init__(self) -> None:
        for name, known in (("scan", tuple(SCANS)), ("gate", GATES), ("out_norm", OUT_NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")

    @classmethod
    def parse(cls, name: str) -> "ForwardType":
        """A published name like "v05_noz" or "v04_ondwconv3_nozact", or in the older spelling "v3noz".

        Raises:
            ValueError: the name is not one of those whose weights are published.
        """
        rest, words = name, dict[str, Any]()
        suffixes: list[tuple[str, dict[str, Any]]] = [
            ("no32", {"fp32": False}),
            ("oact", {"out_act": True}),
            ("noz", {"gate": None}),
            ("nozact", {"gate": "linear"}),
            *((on + suffix, {"out_norm": word}) for on in ("on", "") for suffix, word in _OFFICIAL_OUT_NORMS.items()),
        ]
        for suffix, meaning in suffixes:
            if rest.endswith(suffix):
                words, rest = meaning | words, rest.removesuffix(suffix).removesuffix("_")
        if rest not in _OFFICIAL or (rest in ("v0", "v0seq") and words):
            raise ValueError(
                f"forward_type {name!r} is unknown, known: {', '.join(_OFFICIAL)}, each followed by any of _on"
                f"{'|_on'.join(_OFFICIAL_OUT_NORMS)}, then _noz|_nozact, _oact, _no32; or give a ForwardType"
            )
        scan, fp32 = _OFFICIAL[rest]
        return cls(**{"scan": scan, "fp32": fp32, **words})


class SS2D(PathScans):
    """The SS2D mixer: x, z = in_proj(x); x = silu(conv2d(x)); y = out_norm(scans of x) * silu(z); out_proj(y).

        dt, B, C of path k = x_proj_weight[k] x, then dt = dt_projs_weight[k] dt        all paths at once, tokens as they lie
        y = sum_k selective_scan(x, dt_k, A_k, B_k, C_k, D_k) along path k              (2a), (2b) of arXiv:2312.00752

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N.
        ssm_ratio: Inner width is int(ssm_ratio * d_model).
        dt_rank: Rank of the step sizes, R; "auto" is ceil(d_model / 16).
        act_layer: Activation after the convolution, and of the gate.
        d_conv: Side of the depthwise convolution, odd; below 2 there is none.
        conv_bias, bias: Whether the convolution, and the in and out projections, have a bias.
        dropout: Of the output.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: As in `Mamba`.
        initialize: Start of the scans: "v0" as in `Mamba`; "v1" A and step sizes drawn from normal distributions; "v2"
            A = -1 and step sizes drawn uniformly.
        forward_type: A `ForwardType`, or the published name of one: "v05_noz" in the released models, "v0" in the first.
        channel_first: Images come and go as (batch, d_model, height, width). The parameters stay the same, the
            arithmetic too: such an image in the memory format torch.channels_last is not copied.
        backend: Handed to the op: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, d_model). By paths: x_proj_weight (4, R + 2 N, d_inner), dt_projs_weight
        (4, d_inner, R), dt_projs_bias (4, d_inner), A_logs (4 * d_inner, N), Ds (4 * d_inner,).
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        initialize: Literal["v0", "v1", "v2"] = "v0",
        forward_type: str | ForwardType = "v2",
        channel_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner = int(ssm_ratio * d_model)
        for name, size in (("d_model", d_model), ("d_state", d_state), ("ssm_ratio * d_model", self.d_inner)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dt_rank != "auto" and (not isinstance(dt_rank, int) or dt_rank < 1):
            raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, or below 2 for no convolution, got {d_conv}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        if initialize not in ("v0", "v1", "v2"):
            raise ValueError(f"initialize must be 'v0', 'v1' or 'v2', got {initialize!r}")
        self.d_model, self.d_state, self.channel_first, self.backend = d_model, d_state, channel_first, backend
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.forward_type = ForwardType.parse(forward_type) if isinstance(forward_type, str) else forward_type
        self.fp32 = self.forward_type.fp32
        inner = self.d_inner
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, inner if self.forward_type.gate is None else 2 * inner, bias=bias, **place)
        self.act = act_layer()
        self.conv2d = depthwise(inner, d_conv, bias=conv_bias, **place) if d_conv > 1 else None
        self.add_path_weights(NPATHS, inner, d_state, self.dt_rank, **place)
        self.out_norm = out_norm(self.forward_type.out_norm, inner, **place)
        self.out_act = nn.GELU() if self.forward_type.out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **place)
        self.dropout = nn.Dropout(dropout)

        if initialize == "v0":
            init_dt_projs(self.dt_projs_weight, self.dt_projs_bias, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        elif initialize == "v1":
            nn.init.normal_(self.A_logs)
            nn.init.normal_(self.dt_projs_weight, std=0.1)
            nn.init.normal_(self.dt_projs_bias, std=0.1)
        else:
            nn.init.zeros_(self.A_logs)
            nn.init.uniform_(self.dt_projs_weight, 0, 0.1)
            nn.init.uniform_(self.dt_projs_bias, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of images."""
        axis = 1 if self.channel_first else 3
        if x.ndim != 4 or x.shape[axis] != self.d_model:
            sizes = f"{self.d_model}, height, width" if self.channel_first else f"height, width, {self.d_model}"
            raise ValueError(f"x must have shape (batch, {sizes}), got {tuple(x.shape)}")
        x, z = self.in_proj(x.movedim(axis, 3)), None
        if self.forward_type.gate is not None:
            x, z = x.chunk(2, dim=3)
        if self.conv2d is not None:
            x = self.conv2d(x.movedim(3, 1)).movedim(1, 3)
        x = self.act(x)
        # A scan in fp32 is normalised in fp32, too, where the weights are.
        y = self.out_norm(self.scan(x).to(self.out_proj.weight.dtype)).to(x.dtype)
        y = self.out_act(y)
        if z is not None:
            y = y * (self.act(z) if self.forward_type.gate == "activated" else z)
        return self.dropout(self.out_proj(y)).movedim(3, axis)

    def scan(self, x: Tensor) -> Tensor:
        """The scans along all paths, added up.                  x and result (batch, height, width, d_inner)"""
        height, width = x.shape[1:3]
        paths = SCANS[self.forward_type.scan]
        if paths is not None:
            return self._scan_paths(x, paths(height, width), slice(NPATHS))
        # Rows by the first two sets of parameters, columns by the others; each line has a state of its own.
        for axis, lines, sets in ((2, row, slice(0, 2)), (1, column, slice(2, 4))):
            path = lines(height, width, restarts=True)
            x = F.layer_norm(x, x.shape[3:])
            y, backwards = self._scan_paths(x, (path, path.flip()), sets, merge="stack").unbind(3)
            # The published code adds these results where the walk met them, not where their tokens lie.
            x = y + backwards.flip(axis)
        return x

    def _scan_paths(self, x: Tensor, paths: tuple[ScanPath, ...], sets: slice, merge: str = "sum") -> Tensor:
        """Scans along some paths with some of the sets of parameters."""
        y = cross_selective_scan(**self.scan_inputs(x, sets), paths=paths, merge=merge, backend=self.backend)
        return y.unflatten(1, x.shape[1:3])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        given = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        state_dict.update(released_layout(given, own))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes and forward type, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, {self.forward_type}"


def depthwise(dim: int, side: int, **options: Any) -> nn.Conv2d:
    """A convolution of each channel by itself that keeps the size of the image."""
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, **options)


class Permute(nn.Module):
    """x.permute(axes), as a step of an nn.Sequential."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """The view."""
        return x.permute(self.axes)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Each channel sums to 1."""
        return x.flatten(1, 2).softmax(1).view_as(x)


def out_norm(kind: str | None, dim: int, **place: Any) -> nn.Module:
    """What `ForwardType.out_norm` names, for (batch, height, width, dim)."""
    convolution = Permute(0, 3, 1, 2), depthwise(dim, 3, bias=False, **place), Permute(0, 2, 3, 1)
    made: dict[str | None, nn.Module] = {
        "layer norm": nn.LayerNorm(dim, **place),
        "convolution": nn.Sequential(*convolution),
        "layer norm and convolution": nn.Sequential(nn.LayerNorm(dim, **place), *convolution),
        "softmax": SpatialSoftmax(),
        "sigmoid": nn.Sigmoid(),
        None: nn.Identity(),
    }
    return made[kind]


# Names that published code of another date has for the parameters of the paths, laid end to end there.
_RENAMED = {"x_proj.weight": "x_proj_weight", "dt_projs.weight": "dt_projs_weight", "dt_projs.bias": "dt_projs_bias"}


def released_layout(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of published checkpoints in the names and shapes of the released ones, which are ours.

    Parameters of the paths may stand under other names, all paths in one axis. Weights of projections may be those of a
    1 x 1 convolution, (out, in, 1, 1).

    Args:
        tensors: Of a state dict, with any prefixes.
        own: Those they will replace, by their names.
    """
    adapted = {}
    for name, tensor in tensors.items():
        old = next((old for old in _RENAMED if name == old or name.endswith(f".{old}")), None)
        if old is not None:
            name = name.removesuffix(old) + _RENAMED[old]
        like = own.get(name)
        if like is not None and like.ndim in (2, 3):
            joined = like.flatten(0, 1).shape
            points = ((*like.shape, 1, 1), joined if name.endswith("dt_projs_bias") else None)
            if tensor.shape in (points if like.ndim == 2 else (joined, (*joined, 1))):
                tensor = tensor.reshape(like.shape)
        adapted[name] = tensor
    return adapted
