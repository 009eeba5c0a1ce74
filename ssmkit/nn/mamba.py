"""Mamba-1 layer: projections, short convolution and a gated selective scan.

Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.4 and figure 3. Arguments, parameter names and initialisation are
those of `mamba_ssm.Mamba`, so an official state dict loads.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._inference import carried_state, check_one_token
from ssmkit.nn.linear import product, project
from ssmkit.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_state_step
from ssmkit.paths import ScanPath

MambaState = tuple[Tensor, Tensor]


class Mamba(nn.Module):
    """The Mamba mixer: x, z = in_proj(u); x = silu(conv(x)); y = scan(x) * silu(z); out_proj(y).

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N.
        d_conv: Taps of the short convolution.
        expand: Inner width is expand * d_model.
        dt_rank: Rank of the step sizes; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor.
        dt_init, dt_scale: dt_proj.weight starts uniform in +-dt_scale / sqrt(dt_rank) ("random"), or there ("constant").
        conv_bias, bias: Whether the convolution and the in and out projections have a bias.
        use_fast_path: Accepted for compatibility; there is one path.
        layer_idx: Key of this layer's states in `inference_params.key_value_memory_dict`.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, seqlen, d_model); conv_state (batch, d_conv - 1, d_inner), the last inputs of the
        convolution, oldest first; ssm_state (batch, d_inner, d_state), fp32 (fp64 in a float64 layer).
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
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.layer_idx = layer_idx
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **place
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **place)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **place)
        self.A_log = nn.Parameter(s4d_real(self.d_inner, d_state, device))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        init_dt(self.dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        path: ScanPath | None = None,
        state: MambaState | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: Input                                       (batch, seqlen, d_model)
            inference_params: An object like mamba_ssm's InferenceParams (key_value_memory_dict, seqlen_offset): at offset 0
                the tokens fill this layer's states, later each call takes one token.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            resets: Tokens that drop everything before them              (batch, seqlen) bool
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
            path: Order in which the tokens are visited, by the convolution too; by default as they lie.
            state: (conv_state, ssm_state), continued and then updated in place.
        """
        nseq = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        walk: dict[str, Any] = {"mask": mask, "resets": resets, "cu_seqlens": cu_seqlens, "path": path}
        state, single = carried_state(self, state, inference_params, nseq, **walk)
        if single:
            assert state is not None
            return self.step(hidden_states, *state)[0]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        # A state that is overwritten below must not be the one that backward reads.
        conv_state, ssm_state = (None, None) if state is None else (part.clone() for part in state)
        x, conv_state = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=conv_state,
            return_final_state=True,
            **walk,
            backend=self.backend,
        )
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y, ssm_state = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight),
            self.A(),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            initial_state=ssm_state,
            return_final_state=True,
            **walk,
            backend=self.backend,
        )
        if state is not None:
            for part, final in zip(state, (conv_state, ssm_state), strict=True):
                part.copy_(final.detach())
        return self.out_proj(y)

    def A(self) -> Tensor:
        """Decay rates -exp(A_log), in fp32 or wider.                  (d_inner, d_state)"""
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        return -torch.exp(self.A_log.to(wide))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (batch, 1, d_model). Returns the output and the states, updated in place."""
        check_one_token("hidden_states", hidden_states, self.d_model)
        x, z = project(self.in_proj, hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_step(
            x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", backend=self.backend
        )
        dt, B, C = project(self.x_proj, x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y = selective_state_step(
            ssm_state,
            x,
            product(dt, self.dt_proj.weight),
            self.A(),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            backend=self.backend,
        )
        return project(self.out_proj, y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> MambaState:
        """Zero (conv_state, ssm_state). `dtype` is that of conv_state; ssm_state is fp32, fp64 in a float64 layer.

        max_seqlen is accepted for compatibility: the states do not grow.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_conv - 1, self.d_inner, dtype=dtype or weight.dtype)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=wide)

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"


def s4d_real(dim: int, dstate: int, device: torch.device | str | None = None) -> Tensor:
    """A_log = log(1..dstate) for every channel: S4D-Real, arXiv:2206.11893.     (dim, dstate) fp32"""
    return torch.arange(1, dstate + 1, dtype=torch.float32, device=device).log().repeat(dim, 1)


def checked_dt_rank(d_model: int, dt_rank: int | str, dt_min: float, dt_max: float, dt_init: str) -> int:
    """The rank of the step sizes, ceil(d_model / 16) for "auto"; options that `init_dt` cannot start from are refused."""
    if dt_rank != "auto" and (not isinstance(dt_rank, int) or dt_rank < 1):
        raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
    if dt_init not in ("random", "constant"):
        raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
    return dt_rank if isinstance(dt_rank, int) else math.ceil(d_model / 16)


@torch.no_grad()
def init_dt(proj: nn.Linear, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float) -> None:
    """Start values of the step sizes: softplus(bias) log-uniform in dt_min..dt_max, at least dt_init_floor.

    The bias is marked `_no_reinit`, for model-level passes that zero the biases of linear layers.
    """
    spread = proj.in_features**-0.5 * dt_scale
    if dt_init == "constant":
        nn.init.constant_(proj.weight, spread)
    else:
        nn.init.uniform_(proj.weight, -spread, spread)
    proj.bias.copy_(initial_dt_bias(proj.out_features, dt_min, dt_max, dt_init_floor, proj.weight.device))
    proj.bias._no_reinit = True  # type: ignore[attr-defined]


def initial_dt_bias(
    size: int, dt_min: float, dt_max: float, dt_init_floor: float, device: torch.device | str | None = None
) -> Tensor:
    """Numbers whose softplus is log-uniform in dt_min..dt_max, at least dt_init_floor.       (size,) fp32"""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(size, dtype=torch.float32, device=device) * (high - low) + low).clamp(min=dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
