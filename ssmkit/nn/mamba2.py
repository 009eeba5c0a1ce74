"""Mamba-2 layer: one projection, a short convolution over x, B and C, state-space duality and a gated norm.

Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 7 and figure 6. Arguments, parameter names and
initialisation are those of `mamba_ssm.modules.mamba2.Mamba2` and `Mamba2Simple`, so official state dicts load.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._inference import carried_state, check_one_token
from ssmkit.nn._walk import walk_of
from ssmkit.nn.linear import project
from ssmkit.nn.mamba import MambaState, initial_dt_bias
from ssmkit.nn.rms_norm import RMSNorm
from ssmkit.ops import causal_conv1d, causal_conv1d_step, ssd, ssd_step
from ssmkit.ops._check import check_limits


class Mamba2(nn.Module):
    """The Mamba-2 mixer.

        z0, x0, z, xBC, dt = in_proj(u)                                      one product for all
        x, B, C = silu(conv(xBC));  y = ssd(x, dt, A, B, C) + D x            one decay per head
        y = norm(y * silu(z)), or norm(y) * silu(z) with norm_before_gate;   y * silu(z) without a norm
        out = out_proj([silu(z0) * x0, y])                                   z0, x0 empty unless d_ssm is smaller

    Numbers follow Dao & Gu 2024, arXiv:2405.21060, and the official layer.

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N.
        d_conv: Taps of the short convolution.
        conv_init: Its weights start uniform in +-conv_init; by default as in nn.Conv1d.
        expand: Inner width is expand * d_model.
        headdim: Channels per head, P; it divides d_ssm.
        d_ssm: Channels that are scanned; the rest of the inner width is a gated MLP. By default all.
        ngroups: Groups of heads that share B and C, and of channels that share a mean in the norm.
        A_init_range: A starts uniform in minus this range.
        D_has_hdim: One skip weight per channel, not per head.
        rmsnorm, norm_before_gate: Whether there is a norm before out_proj, and its order.
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor.
        dt_limit: Step sizes are clamped into it.
        bias, conv_bias: Whether the in and out projections and the convolution have a bias.
        chunk_size, use_mem_eff_path: Accepted for compatibility; the op knows its chunk, and there is one path.
        layer_idx: Key of this layer's states in `inference_params.key_value_memory_dict`.
        process_group, sequence_parallel: There is no tensor parallelism: a process group is refused, and
            sequence_parallel means nothing without one.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, seqlen, d_model); conv_state (batch, d_conv - 1, conv_dim), the last inputs of the
        convolution, oldest first, with conv_dim = d_ssm + 2 * ngroups * d_state; ssm_state (batch, nheads, headdim,
        d_state), fp32 (fp64 in a float64 layer).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "headdim": headdim}
        for name, size in (sizes | {"ngroups": ngroups}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if process_group is not None:
            raise ValueError(
                f"process_group must be None, got {process_group!r}: the layer is not split over processes; "
                "wrap the model in DistributedDataParallel or fully_shard instead"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups = headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 1 <= self.d_ssm <= self.d_inner or self.d_ssm % headdim:
            raise ValueError(
                f"d_ssm must be a multiple of headdim {headdim} from 1 to the inner width {self.d_inner}, got {self.d_ssm}"
            )
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the number of heads {self.nheads}, got {ngroups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be (low, high) with 0 < low <= high, got {tuple(A_init_range)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        check_limits(dt_limit)
        self.D_has_hdim, self.dt_limit = D_has_hdim, (float(dt_limit[0]), float(dt_limit[1]))
        self.d_mlp, self.conv_dim = self.d_inner - self.d_ssm, self.d_ssm + 2 * ngroups * d_state
        self.layer_idx = layer_idx
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + self.conv_dim + self.nheads, bias=bias, **place)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias, **place
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device).to(dtype))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = (
            RMSNorm(
                self.d_ssm,
                group_size=self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate,
                backend=backend,
                **place,
            )
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)

    def forward(
        self,
        hidden_states: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        state: MambaState | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: Input                                        (batch, seqlen, d_model)
            seqlen: Given, hidden_states and the output are flattened    (batch * seqlen, d_model)
            seq_idx: Number of each token's sequence; a change is a reset, negative numbers are pads. Not read with
                cu_seqlens, which cuts at the same places.               (batch, seqlen) int
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
            inference_params: An object like mamba_ssm's InferenceParams (key_value_memory_dict, seqlen_offset): at offset 0
                the tokens fill this layer's states, later each call takes one token.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            resets: Tokens that drop everything before them              (batch, seqlen) bool
            state: (conv_state, ssm_state), continued and then updated in place; with cu_seqlens one for each sequence.
        """
        if seqlen is not None:
            hidden_states = unflatten(hidden_states, seqlen, self.d_model)
        if seq_idx is not None and cu_seqlens is None:
            resets, mask = walk_of(seq_idx, hidden_states, resets, mask)
        nseq = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state, single = carried_state(
            self, state, inference_params, nseq, mask=mask, resets=resets, seq_idx=seq_idx, cu_seqlens=cu_seqlens
        )
        if single:
            assert state is not None
            out = self.step(hidden_states, *state)[0]
            return out if seqlen is None else out.flatten(0, 1)
        z0, x0, z, xBC, dt = self._project(hidden_states)
        # A state that is overwritten below must not be the one that backward reads.
        old_conv, old_ssm = (None, self.initial_state(nseq)) if state is None else (part.clone() for part in state)
        walk: dict[str, Any] = {"mask": mask, "resets": resets, "cu_seqlens": cu_seqlens, "backend": self.backend}
        xBC, new_conv = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=old_conv,
            return_final_state=True,
            **walk,
        )
        x, A, B, C = self._heads(xBC)
        y, new_ssm = ssd(
            x,
            dt,
            A,
            B,
            C,
            z=None if self.norm is not None else z.unflatten(-1, (self.nheads, self.headdim)),
            **self._rates(),
            initial_state=old_ssm,
            return_final_state=True,
            **walk,
        )
        if state is not None:
            for part, final in zip(state, (new_conv, new_ssm), strict=True):
                part.copy_(final.detach())
        out = self._merge(y.flatten(-2), z, z0, x0)
        return out if seqlen is None else out.flatten(0, 1)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """z0, x0, z, xBC, dt of some tokens."""
        sizes = (self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.nheads)
        return project(self.in_proj, hidden_states).split(sizes, dim=-1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, A, B, C as the scan takes them, from (..., conv_dim)."""
        x, B, C = xBC.split((self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state), dim=-1)
        B, C = (weight.unflatten(-1, (self.ngroups, self.d_state)) for weight in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), self.A(), B, C

    def _rates(self) -> dict[str, Any]:
        """What scan and step are told besides their tensors."""
        D = self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D
        return {"D": D, "dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}

    def _merge(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        """Norm and gate, the MLP's channels before those of the scan, and the output projection."""
        y = y if self.norm is None else self.norm(y, z)
        return project(self.out_proj, torch.cat([F.silu(z0) * x0, y], dim=-1) if self.d_mlp else y)

    def A(self) -> Tensor:
        """Decay rates -exp(A_log), in fp32 or wider.                  (nheads,)"""
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        return -torch.exp(self.A_log.to(wide))

    def initial_state(self, nseq: int) -> Tensor | None:
        """The ssm_state before any token; None is zero."""
        return None

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (batch, 1, d_model). Returns the output and the states, updated in place.

        It is `forward` over one token in every option; the official step ignores dt_limit and fails with D_has_hdim.
        """
        check_one_token("hidden_states", hidden_states, self.d_model)
        z0, x0, z, xBC, dt = self._project(hidden_states.squeeze(1))
        xBC = causal_conv1d_step(
            xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", backend=self.backend
        )
        x, A, B, C = self._heads(xBC)
        y = ssd_step(
            ssm_state,
            x,
            dt,
            A,
            B,
            C,
            z=None if self.norm is not None else z.unflatten(-1, (self.nheads, self.headdim)),
            **self._rates(),
            backend=self.backend,
        )
        return self._merge(y.flatten(1), z, z0, x0).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> MambaState:
        """(conv_state, ssm_state) before any token; `dtype` is that of conv_state, ssm_state is fp32 or fp64 as the layer.

        max_seqlen is accepted for compatibility: the states do not grow.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_conv - 1, self.conv_dim, dtype=dtype or weight.dtype)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        ssm_state = weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=wide)
        initial = self.initial_state(batch_size)
        return conv_state, ssm_state if initial is None else ssm_state.copy_(initial.detach())

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"headdim={self.headdim}, ngroups={self.ngroups}"
        )


class Mamba2Simple(Mamba2):
    """Mamba2 with the defaults of `mamba_ssm.modules.mamba2_simple.Mamba2Simple` and, if asked, a learned initial state.

    Args:
        d_state, headdim: Other defaults than in `Mamba2`.
        learnable_init_states: The scan starts from `init_states` (nheads, headdim, d_state), zero at first, shared by all
            sequences. After a reset it is not seen again; pack with cu_seqlens to start each sequence from it.
        activation: "silu" or "swish", which is the same.
        use_mem_eff_path: The official layer normalises groups of d_inner / ngroups channels on its fused path and all
            channels off it. So does this one; the two agree for one group.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        if activation not in ("silu", "swish"):
            raise ValueError(f"activation must be 'silu' or 'swish', got {activation!r}")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        if self.norm is not None and not use_mem_eff_path:
            self.norm.group_size = None
        self.init_states: nn.Parameter | None = None
        if learnable_init_states:
            shape = (self.nheads, self.headdim, d_state)
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            self.init_states._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, seq_idx: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Mix the tokens; arguments as in `Mamba2.forward`, in the official layer's order."""
        return super().forward(hidden_states, seq_idx=seq_idx, **options)

    def initial_state(self, nseq: int) -> Tensor | None:
        """The learned ssm_state, one copy for each sequence."""
        return None if self.init_states is None else self.init_states.expand(nseq, -1, -1, -1)


def unflatten(hidden_states: Tensor, seqlen: int, d_model: int) -> Tensor:
    """(batch * seqlen, d_model) as (batch, seqlen, d_model)."""
    if hidden_states.ndim != 2 or seqlen < 1 or hidden_states.shape[0] % seqlen:
        raise ValueError(
            f"hidden_states must have shape (batch * seqlen, {d_model}) with seqlen {seqlen}, "
            f"got {tuple(hidden_states.shape)}; leave seqlen out for (batch, seqlen, {d_model})"
        )
    return hidden_states.unflatten(0, (-1, seqlen))
