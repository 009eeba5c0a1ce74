"""LocalMamba's mixers: scans whose directions include walks from window to window.

Huang et al. 2024, "LocalMamba", arXiv:2403.09338, sections 4.1 and 4.2. Arguments, parameter names and initialisation are
those of the published code, so its state dicts load: `MultiMamba` is the mixer of LocalVim, `LocalSS2D` that of LocalVMamba.
"""

import re
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.bi_attn import BiAttn
from ssmkit.nn.mamba import checked_dt_rank, init_dt
from ssmkit.nn.ss2d import NPATHS, SS2D, ForwardType
from ssmkit.nn.vim import add_direction, scan
from ssmkit.ops import cross_selective_scan
from ssmkit.paths import ScanPath, column, row, windows

DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")


def checked_directions(directions: Sequence[str]) -> tuple[str, ...]:
    """Directions as a tuple, each one of DIRECTIONS or a window of another size."""
    directions = tuple(directions)
    for direction in directions:
        if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
            raise ValueError(
                f"directions must be h (rows), v (columns) or w and the size of a window, each with or without _flip for "
                f"backwards, got {direction!r}"
            )
    if not directions:
        raise ValueError("directions must name at least one, got none")
    return directions


def route(direction: str, height: int, width: int) -> tuple[ScanPath, int, int]:
    """The path of a direction, and the height and width to which it wants the image padded."""
    name = direction.removesuffix("_flip")
    if name.startswith("w"):
        side = int(name[1:])
        height, width = (-(-size // side) * side for size in (height, width))
        path = windows(height, width, side)
    else:
        path = (row if name == "h" else column)(height, width)
    return path.flip() if direction.endswith("_flip") else path, height, width


def pad_image(x: Tensor, height: int, width: int) -> Tensor:
    """(batch, rows, columns, channels) with zeros below and on the right; x itself where there is nothing to add."""
    below, right = height - x.shape[1], width - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


class MultiMamba(nn.Module):
    """LocalVim's mixer: x, z = in_proj(u); out_proj of the sum over directions i of attn(y_i).

        x_i = silu(conv1d_i(x)) along path i
        y_i = scan of x_i along path i with x_proj_i, dt_proj_i, A_log_i, D_i, times silu(z)

    Where a window does not divide the image, zeros are put below it and on its right. As published, they take part in the
    convolution and the scan of that direction, and are dropped after it.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias: As in
            `Mamba`.
        use_fast_path, layer_idx, bimamba_type: Accepted for compatibility; there is one path, and no state to keep.
        directions: The paths, each with parameters of its own: "h" rows, "v" columns, "w2", "w7" windows of that side, row
            by row between and inside; with "_flip" backwards.
        token_size: Height and width of images when forward is not told.
        use_middle_cls_token: A class token lies in the middle of the tokens, and is visited in the middle of each path.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, height * width, d_model), with a class token one token more
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        directions: Sequence[str] = ("h", "h_flip", "w2", "w2_flip"),
        token_size: tuple[int, int] = (14, 14),
        use_middle_cls_token: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.directions = checked_directions(directions)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.layer_idx = layer_idx
        self.token_size, self.use_middle_cls_token, self.backend = token_size, use_middle_cls_token, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        for i in range(len(self.directions)):
            add_direction(self, f"_{i}", self.d_inner, d_state, d_conv, self.dt_rank, conv_bias=conv_bias, **place)
            init_dt(getattr(self, f"dt_proj_{i}"), dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)
        self.attn = BiAttn(self.d_inner, **place)

    def forward(self, hidden_states: Tensor, token_size: tuple[int, int] | None = None) -> Tensor:
        """Mix the tokens of images.

        Args:
            hidden_states: Input                           (batch, height * width [+ 1], d_model)
            token_size: Height and width; by default those given at the start.
        """
        height, width = self.token_size if token_size is None else token_size
        length = height * width + self.use_middle_cls_token
        if hidden_states.ndim != 3 or tuple(hidden_states.shape[1:]) != (length, self.d_model):
            raise ValueError(
                f"hidden_states must have shape (batch, {length}, {self.d_model}) for token_size {(height, width)}, "
                f"got {tuple(hidden_states.shape)}"
            )
        xz = self.in_proj(hidden_states)
        weighed = (self.attn(self._direction(i, xz, height, width)) for i in range(len(self.directions)))
        out: Tensor = self.out_proj(reduce(torch.add, weighed))
        return out

    def _direction(self, i: int, xz: Tensor, height: int, width: int) -> Tensor:
        """Convolution, scan and gate along one path.          xz (batch, length, 2 d_inner) to (batch, length, d_inner)"""
        path, tall, wide = route(self.directions[i], height, width)
        middle = height * width // 2  # of the tokens and of each walk, where the class token stands
        padded = (tall, wide) != (height, width)
        if padded:
            # The image, then the class token.
            tokens = self._without(xz, middle).unflatten(1, (height, width))
            cls = xz[:, middle : middle + self.use_middle_cls_token]
            xz = torch.cat([pad_image(tokens, tall, wide).flatten(1, 2), cls], dim=1)
        if self.use_middle_cls_token:
            path = path.with_tokens(tall * wide if padded else middle, position=middle)
        x, z = xz.chunk(2, dim=2)
        y = scan(self, f"_{i}", x, {"path": path}, z=z)
        if not padded:
            return y
        image, cls = y[:, : tall * wide].unflatten(1, (tall, wide)), y[:, tall * wide :]
        tokens = image[:, :height, :width].flatten(1, 2)
        return torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], dim=1)

    def _without(self, tokens: Tensor, middle: int) -> Tensor:
        """All but the class token."""
        if not self.use_middle_cls_token:
            return tokens
        return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)

    def extra_repr(self) -> str:
        """Sizes and directions, for print()."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"directions={self.directions}"
        )


class LocalSS2D(SS2D):
    """LocalVMamba's mixer: `SS2D` along four directions, their results weighed by a BiAttn that they share.

        y = out_norm(sum_k attn(selective_scan(x, dt_k, A_k, B_k, C_k, D_k) along path k)) * silu(z)

    Where a window does not divide the image, zeros are put below it and on its right, after the convolution and its
    activation. As published, they take part in the scans of that window, and are dropped after them.

    Args:
        d_model: Width of input and output.
        directions: Four of those of `MultiMamba`.
        ss2d: Further arguments of `SS2D`, but for forward_type and channel_first.
    Shapes:
        x and output (batch, height, width, d_model); parameters as those of `SS2D`
    """

    def __init__(
        self,
        d_model: int = 96,
        directions: Sequence[str] = ("h", "h_flip", "v", "v_flip"),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ss2d: Any,
    ) -> None:
        self.directions = checked_directions(directions)
        if len(self.directions) != NPATHS:
            raise ValueError(f"directions must name {NPATHS}, got {len(self.directions)}")
        super().__init__(d_model, forward_type=ForwardType(fp32=True), device=device, dtype=dtype, **ss2d)
        self.multi_scan = nn.ModuleDict({"attn": BiAttn(self.d_inner, device=device, dtype=dtype)})

    def scan(self, x: Tensor) -> Tensor:
        """The scans along all directions, weighed and added up.        x and result (batch, height, width, d_inner)"""
        height, width = x.shape[1:3]
        # Directions that want the same padding are scanned together.
        together: dict[tuple[int, int], list[int]] = {}
        routes = [route(direction, height, width) for direction in self.directions]
        for k, (_, tall, wide) in enumerate(routes):
            together.setdefault((tall, wide), []).append(k)
        total: Tensor | None = None
        for (tall, wide), which in together.items():
            sets: Any = slice(NPATHS) if len(which) == NPATHS else which
            paths = [routes[k][0] for k in which]
            inputs = self.scan_inputs(pad_image(x, tall, wide), sets)
            y = cross_selective_scan(**inputs, paths=paths, merge="stack", backend=self.backend)
            y = y.unflatten(1, (tall, wide))[:, :height, :width]
            y = y.to(self.out_proj.weight.dtype)
            weighed = (y * self.multi_scan["attn"].gates(y, (1, 2))).sum(3)  # type: ignore[operator]
            total = weighed if total is None else total + weighed
        assert total is not None
        return total
