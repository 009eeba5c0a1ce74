"""Vim's bidirectional mixer: one pair of projections, scans of the tokens in both directions, one gate.

Zhu et al. 2024, "Vision Mamba", arXiv:2401.09417, algorithm 1. Arguments, parameter names and initialisation are those of
its `Mamba(bimamba_type=...)`, so official state dicts load. VideoMamba (arXiv:2403.06977) uses the same mixer.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.mamba import checked_dt_rank, init_dt, s4d_real
from ssmkit.ops import causal_conv1d, cross_selective_scan, selective_scan
from ssmkit.paths import ScanPath

Paths = ScanPath | Sequence[ScanPath] | None


class BiMamba(nn.Module):
    """Vim's mixer: x, z = in_proj(u); y = scan(x) + backward scan(x); out_proj(y * silu(z)), times gamma if there is one.

        v2:  x_f = silu(conv1d(x)),   y_f = scan(x_f) with x_proj, dt_proj, A_log, D
             x_b = silu(conv1d_b(x)), y_b = scan(x_b) with x_proj_b, dt_proj_b, A_b_log, D_b, from the last token to the first
        v1:  the backward scan shares x_f and all that is made of it, and differs in A_b_log alone

    Nothing is flipped: conv1d_b is anti-causal, its last tap at the token itself, and the backward scan walks backwards.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias: As in
            `Mamba`. dt_proj_b starts as any nn.Linear, as in the published code.
        use_fast_path, layer_idx: Accepted for compatibility; there is one path, and no state to keep.
        bimamba_type: "v2", that of all released models, or "v1".
        if_divide_out: Halve the sum of both directions; v1 never does.
        init_layer_scale: Start of gamma, a factor per output channel; None for none.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, seqlen, d_model)
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
        bimamba_type: Literal["v1", "v2"] = "v2",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if bimamba_type not in ("v1", "v2"):
            way_out = "; without a backward direction it is ssmkit.nn.Mamba" if bimamba_type == "none" else ""
            raise ValueError(f"bimamba_type must be 'v1' or 'v2', got {bimamba_type!r}{way_out}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.layer_idx = layer_idx
        self.bimamba_type, self.if_divide_out, self.backend = bimamba_type, if_divide_out, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **place))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        sizes = self.d_inner, d_state, d_conv, self.dt_rank
        add_direction(self, "", *sizes, conv_bias=conv_bias, **place)
        init_dt(self.dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)  # type: ignore[arg-type]
        if bimamba_type == "v2":
            add_direction(self, "_b", *sizes, conv_bias=conv_bias, **place)
        else:
            self.A_b_log = nn.Parameter(s4d_real(self.d_inner, d_state, device))
            self.A_b_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        path: Paths = None,
        path_b: Paths = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: Input                                         (batch, seqlen, d_model)
            path: Order in which the forward direction visits the tokens, its convolution too; by default as they lie.
                Of several paths the outputs are added up.
            path_b: That of the backward direction; by default `path` backwards.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
        """
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        forwards = walks(path)
        backwards = walks(path_b) if path_b is not None else [backwards_of(walk) for walk in forwards]
        tokens: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens}
        if self.bimamba_type == "v1":
            y = self._scan_both(x, forwards, backwards, mask, cu_seqlens)
        else:
            directions = [("", walk) for walk in forwards] + [("_b", walk) for walk in backwards]
            scans = (scan(self, suffix, x, walk | tokens, halved=self.if_divide_out) for suffix, walk in directions)
            y = reduce(torch.add, scans)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out if self.gamma is None else out * self.gamma

    def _scan_both(
        self,
        x: Tensor,
        forwards: list[dict[str, Any]],
        backwards: list[dict[str, Any]],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """v1: both directions of the same tokens, in one call."""
        if cu_seqlens is not None or len(forwards) != 1 or len(backwards) != 1:
            raise ValueError("bimamba_type 'v1' takes one path and no cu_seqlens; give each sequence a row of its own")
        x = convolved(self, "", x, {**forwards[0], "mask": mask})
        dt, B, C = steps_and_weights(self, "", x)
        line = ScanPath.identity(x.shape[1])
        paths = [forwards[0].get("path", line), backwards[0].get("path", line.flip())]

        def twice(shared: Tensor, axis: int) -> Tensor:
            return shared.unsqueeze(axis).expand(*shared.shape[:axis], 2, *shared.shape[axis:])

        return cross_selective_scan(
            x,
            twice(dt, 2),
            torch.stack((decays(self.A_log), decays(self.A_b_log))),  # type: ignore[arg-type]
            twice(B, 2),
            twice(C, 2),
            paths,
            D=twice(self.D, 0),  # type: ignore[arg-type]
            dt_bias=twice(self.dt_proj.bias, 0),  # type: ignore[arg-type, union-attr]
            dt_softplus=True,
            mask=mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"bimamba_type={self.bimamba_type!r}, if_divide_out={self.if_divide_out}"
        )


def add_direction(
    module: nn.Module,
    suffix: str,
    dim: int,
    d_state: int,
    d_conv: int,
    dt_rank: int,
    *,
    conv_bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """What one direction of a scan over `dim` channels learns: conv1d, x_proj, dt_proj, A_log, D, each with the suffix."""
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    conv = nn.Conv1d(dim, dim, d_conv, groups=dim, padding=d_conv - 1, bias=conv_bias, **place)
    module.add_module(f"conv1d{suffix}", conv)
    module.add_module(f"x_proj{suffix}", nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **place))
    module.add_module(f"dt_proj{suffix}", nn.Linear(dt_rank, dim, bias=True, **place))
    decay, skip = nn.Parameter(s4d_real(dim, d_state, device)), nn.Parameter(torch.ones(dim, device=device))
    for name, parameter in ((decay_name(suffix), decay), (f"D{suffix}", skip)):
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
        module.register_parameter(name, parameter)


def scan(
    module: Any, suffix: str, x: Tensor, walk: dict[str, Any], *, halved: bool = False, z: Tensor | None = None
) -> Tensor:
    """One direction along a walk: convolution, step sizes and weights of each token, scan, times silu(z) if given.

    Args:
        module: Has what `add_direction` made with `suffix`, and dt_rank, d_state, backend.
        x: Tokens in their own order                          (batch, seqlen, dim)
        walk: Options of the ops: path, reverse, mask, cu_seqlens.
        halved: Return half of it.
    """
    x = convolved(module, suffix, x, walk)
    dt, B, C = steps_and_weights(module, suffix, x)
    D = getattr(module, f"D{suffix}")
    if halved:  # y is linear in C and D, which are smaller
        C, D = C / 2, D / 2
    y: Tensor = selective_scan(  # type: ignore[assignment]
        x,
        dt,
        decays(getattr(module, decay_name(suffix))),
        B,
        C,
        D=D,
        z=z,
        dt_bias=getattr(module, f"dt_proj{suffix}").bias,
        dt_softplus=True,
        **walk,
        backend=module.backend,
    )
    return y


def convolved(module: Any, suffix: str, x: Tensor, walk: dict[str, Any]) -> Tensor:
    """silu(conv1d(x)) along a walk."""
    conv = getattr(module, f"conv1d{suffix}")
    taps = conv.weight.squeeze(1), conv.bias
    out: Tensor = causal_conv1d(  # type: ignore[assignment]
        x, *taps, activation="silu", **walk, backend=module.backend
    )
    return out


def steps_and_weights(module: Any, suffix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt (before its bias), B and C of each token."""
    sizes = module.dt_rank, module.d_state, module.d_state
    dt, B, C = getattr(module, f"x_proj{suffix}")(x).split(sizes, dim=-1)
    return F.linear(dt, getattr(module, f"dt_proj{suffix}").weight), B, C


def decay_name(suffix: str) -> str:
    """A_log, A_b_log as Vim has it; with a number, as of LocalMamba's directions, A_log_0."""
    return f"A_log{suffix}" if suffix[1:].isdigit() else f"A{suffix}_log"


def decays(A_log: Tensor) -> Tensor:
    """-exp(A_log), in fp32 or wider."""
    return -torch.exp(A_log.to(torch.float64 if A_log.dtype == torch.float64 else torch.float32))


def walks(path: Paths) -> list[dict[str, Any]]:
    """Paths as options of the ops."""
    if path is None:
        return [{}]
    paths = [path] if isinstance(path, ScanPath) else list(path)
    if not paths:
        raise ValueError("path must be a ScanPath or several of them, got none")
    return [{"path": each} for each in paths]


def backwards_of(walk: dict[str, Any]) -> dict[str, Any]:
    """The same tokens from the last to the first; segments of the path stay the same."""
    return {"path": walk["path"].flip()} if "path" in walk else {"reverse": True}
