"""Mamba-3 layer, one input and one output per channel (SISO): a trapezoidal rule, and a state that turns.

    h_t = alpha_t h_{t-1} + beta_t v_{t-1} k_{t-1}^T + gamma_t v_t k_t^T          (1)  per head, (headdim, d_state)
    alpha_t = exp(dt_t A_t),  beta_t = (1 - lambda_t) dt_t alpha_t,  gamma_t = lambda_t dt_t
    y_t = h_t q_t + D v_t                                                         (2)

k and q are B and C turned by the angle sum_{s<=t} dt_s theta_s. The state-space duality op runs (1) in the form

    h_t = sum_{s<=t} exp(sum_{s<r<=t} dt_r A_r) w_s v_s k_s^T - ahead_t v_t k_t^T,   w_s = gamma_s + ahead_s      (3)

with ahead_s = dt_{s+1} (1 - lambda_{s+1}), zero at the end of a sequence. "Mamba-3", arXiv:2603.15569.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._inference import carried_state, check_one_token
from ssmkit.nn._walk import Walk, walk_of, walk_over
from ssmkit.nn.linear import project
from ssmkit.nn.mamba import initial_dt_bias
from ssmkit.nn.rms_norm import RMSNorm
from ssmkit.ops import ssd, ssd_step
from ssmkit.ops._check import check_cu_seqlens, check_flag, check_shape
from ssmkit.ops._define import acc_dtype

# A step so short decays by less than rounding does; dividing by it stays within fp32, squared too.
SHORTEST_STEP = 1e-12


class Mamba3State(NamedTuple):
    """What a sequence carries on, for nseq of them."""

    angle: Tensor  # (nseq, nheads, nangles), in 0..2 pi, fp32 or fp64
    ssm: Tensor  # (nseq, nheads, headdim, d_state), fp32 or fp64
    k: Tensor  # (nseq, 1, nheads, d_state), the last token's turned B, fp32 or fp64
    v: Tensor  # (nseq, nheads, headdim), the last token's x


class Tokens(NamedTuple):
    """What the recurrence takes of every token, in fp32 or fp64."""

    v: Tensor  # (batch, seqlen, nheads, headdim)
    k: Tensor  # (batch, seqlen, nheads, d_state), not yet turned
    q: Tensor  # (batch, seqlen, nheads, d_state), not yet turned
    A: Tensor  # (batch, seqlen, nheads)
    dt: Tensor  # (batch, seqlen, nheads)
    lam: Tensor  # (batch, seqlen, nheads)
    theta: Tensor  # (batch, seqlen, nangles)


class Mamba3(nn.Module):
    """The Mamba-3 mixer in its SISO form; there is no convolution.

        z, x, B, C, dt, A, lambda, theta = in_proj(u)               each token has its own decay rate
        dt = softplus(dt + dt_bias);  lambda = sigmoid(lambda);  theta = pi tanh(theta)
        A = -f(A), at most -A_floor, with f(a) = 1 + a for a >= 0 and 1 / (1 - a) below
        k, q = norm(B) + B_bias, norm(C) + C_bias, turned by the angle in the pairs (2i, 2i + 1), i < nangles
        y = (1), (2) of this file with v = x;  out_proj(y * silu(z)), or out_proj(norm(y) * silu(z))

    Follows "Mamba-3", arXiv:2603.15569, and the layer `mamba_ssm.modules.mamba3.Mamba3`, whose arguments, parameter names
    and initialisation these are. The numbers were compared with the reference recurrence of that project's tests; there
    are no published weights to compare with. Its MIMO form (is_mimo) is not here. The scan runs in fp32 (fp64 in a
    float64 layer) whatever the activations are, the official kernel's products in bf16.

    Args:
        d_model: Width of input and output.
        d_state: States per channel, N.
        expand: Inner width is expand * d_model.
        headdim: Channels per head, P.
        ngroups: Groups of heads that share the projections B and C.
        rope_fraction: Share of the states that turn, 0.5 or 1; nangles is half of their number.
        dt_min, dt_max, dt_init_floor: Initial step sizes are drawn log-uniformly from dt_min..dt_max, at least the floor.
        A_floor: The slowest decay rate.
        is_outproj_norm: Normalise each head before the gate.
        is_mimo: Must be False.
        mimo_rank, fuse_pregate_headwise_norm, chunk_size, dropout, n_layer: Accepted for compatibility, without effect (in
            the official layer too, those of MIMO and of the kernels apart).
        layer_idx: Key of this layer's states in `inference_params.key_value_memory_dict`.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, seqlen, d_model); states as in `Mamba3State`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        fuse_pregate_headwise_norm: bool = True,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if is_mimo:
            raise ValueError(
                "is_mimo must be False: the layer has the SISO form only, one input per channel; leave it out"
            )
        sizes = {"d_model": d_model, "d_state": d_state, "expand": expand, "headdim": headdim, "ngroups": ngroups}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.d_model, self.d_state, self.expand = d_model, d_state, expand
        self.headdim, self.ngroups = headdim, ngroups
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim:
            raise ValueError(f"headdim must divide the inner width {self.d_inner}, got {headdim}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the number of heads {self.nheads}, got {ngroups}")
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1.0, got {rope_fraction}")
        self.nangles = int(d_state * rope_fraction) // 2
        if self.nangles < 1:
            raise ValueError(f"d_state must be at least {round(2 / rope_fraction)} for a pair to turn, got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if A_floor <= 0:
            raise ValueError(f"A_floor must be positive, got {A_floor}")
        self.A_floor = A_floor
        self.layer_idx = layer_idx
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, sum(self._widths()), bias=False, **place)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, device))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state, device=device))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, 1, d_state, device=device))
        self.B_norm = RMSNorm(d_state, backend=backend, **place)
        self.C_norm = RMSNorm(d_state, backend=backend, **place)
        self.D = nn.Parameter(torch.ones(self.nheads, device=device))
        for parameter in (self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = RMSNorm(self.d_inner, group_size=headdim, backend=backend, **place) if is_outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **place)

    def _widths(self) -> tuple[int, ...]:
        """Of z, x, B, C, dt, A, lambda and theta in the projection."""
        shared = self.ngroups * self.d_state
        return (self.d_inner, self.d_inner, shared, shared, self.nheads, self.nheads, self.nheads, self.nangles)

    def forward(
        self,
        hidden_states: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        state: Mamba3State | tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: Input                                        (batch, seqlen, d_model)
            seq_idx: Number of each token's sequence; a change is a reset, negative numbers are pads. Not read with
                cu_seqlens, which cuts at the same places.               (batch, seqlen) int
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
            inference_params: An object like mamba_ssm's InferenceParams (key_value_memory_dict, seqlen_offset): at offset 0
                the tokens fill this layer's states, later each call takes one token.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            resets: Tokens that drop everything before them              (batch, seqlen) bool
            state: As in `Mamba3State`, continued and then updated in place; with cu_seqlens one for each sequence.
        """
        batch, seqlen = hidden_states.shape[:2]
        if seq_idx is not None and cu_seqlens is None:
            resets, mask = walk_of(seq_idx, hidden_states, resets, mask)
        nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state, single = carried_state(
            self, state, inference_params, nseq, mask=mask, resets=resets, seq_idx=seq_idx, cu_seqlens=cu_seqlens
        )
        if single:
            assert state is not None
            return self.step(hidden_states, *state)[0]
        if not hidden_states.numel():
            return torch.zeros_like(hidden_states)
        check_flag("resets", resets, batch, seqlen)
        check_flag("mask", mask, batch, seqlen)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, seqlen, "hidden_states")
        if state is not None:
            for name, part, shape in zip(Mamba3State._fields, state, self._state_shapes(nseq), strict=True):
                check_shape(f"state {name}", part, shape)
        z, tokens = self._project(hidden_states)
        walk = walk_over(batch, seqlen, resets, mask, cu_seqlens, hidden_states.device)
        # A state that is overwritten below must not be the one that backward reads.
        old = None if state is None else Mamba3State(*(part.clone() for part in state))
        y, new = self._scan(tokens, walk, old, {"resets": resets, "mask": mask, "cu_seqlens": cu_seqlens})
        if state is not None:
            for part, final in zip(state, new, strict=True):
                part.copy_(final.detach())
        return self._merge(y, z)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tokens]:
        """z and what the recurrence takes, of tokens (..., d_model)."""
        z, x, B, C, dt, A, lam, theta = project(self.in_proj, hidden_states).split(self._widths(), dim=-1)
        acc = acc_dtype(x.dtype)
        k, q = (
            norm(weight.unflatten(-1, (self.ngroups, self.d_state))).to(acc).repeat_interleave(repeats, dim=-2)
            + bias.to(acc).squeeze(1)
            for norm, weight, bias, repeats in (
                (self.B_norm, B, self.B_bias, self.nheads // self.ngroups),
                (self.C_norm, C, self.C_bias, self.nheads // self.ngroups),
            )
        )
        tokens = Tokens(
            v=x.unflatten(-1, (self.nheads, self.headdim)).to(acc),
            k=k,
            q=q,
            A=(-decay_rate(A.to(acc))).clamp(max=-self.A_floor),
            dt=F.softplus(dt.to(acc) + self.dt_bias.to(acc)),
            lam=torch.sigmoid(lam.to(acc)),
            theta=math.pi * torch.tanh(theta.to(acc)),
        )
        return z, tokens

    def _scan(
        self, tokens: Tokens, walk: Walk, old: Mamba3State | None, flags: dict[str, Any]
    ) -> tuple[Tensor, Mamba3State]:
        """Equation (3) and (2), and what the sequences carry on."""
        v, k, q, A, dt, lam, theta = tokens
        if flags["mask"] is not None:
            dt = torch.where(flags["mask"][..., None], dt, 0.0)
        angle = self._angles(dt, theta, walk, None if old is None else old.angle)
        # Both turn alike, so their product is known before.
        own = (k * q).sum(-1)
        cos, sin = angle.cos(), angle.sin()
        k, q = rotate(k, cos, sin), rotate(q, cos, sin)

        beta = dt * (1 - lam)  # without the decay, which comes with the token after
        ahead = torch.where(walk.linked[:, None], beta.flatten(0, 1)[walk.after], 0.0).view_as(beta)
        initial = None
        if old is not None:
            first = torch.where(walk.begun[:, None], beta.flatten(0, 1)[walk.first], 0.0)
            initial = old.ssm + torch.einsum("sh,shp,shn->shpn", first, old.v.to(v.dtype), old.k[:, 0].to(k.dtype))
        steps = (-A * dt).clamp(min=SHORTEST_STEP)
        y, ssm = ssd(
            v * ((lam * dt + ahead) / steps)[..., None],
            steps,
            -torch.ones_like(self.D, dtype=v.dtype),
            k,
            q,
            initial_state=initial,
            return_final_state=True,
            backend=self.backend,
            **flags,
        )
        y = y + (self.D.to(v.dtype) - ahead * own)[..., None] * v
        if flags["mask"] is not None:
            y = torch.where(flags["mask"][..., None, None], y, 0.0)
        angles = angle.flatten(0, 1)[walk.last]
        if old is not None:
            angles = torch.where(walk.empty[:, None, None], old.angle, angles)
        k_last = walk.latest(k, None if old is None else old.k[:, 0]).unsqueeze(1)
        return y, Mamba3State(angles, ssm, k_last, walk.latest(v, None if old is None else old.v))

    def _angles(self, dt: Tensor, theta: Tensor, walk: Walk, initial: Tensor | None) -> Tensor:
        """Angle of each token in 0..2 pi, summed in fp64: a sum over many tokens would lose the digits that matter."""
        turn_BLHS = dt.double()[..., None] * theta.double()[..., None, :]
        total = turn_BLHS.cumsum(1)
        if walk.cut:
            before = (total - turn_BLHS).flatten(0, 1)[walk.origin].view_as(total)
            total = total - before
        if initial is not None:
            carried = torch.where(walk.inherits[:, None, None], initial[walk.sequence], 0.0)
            total = total + carried.view_as(total)
        return torch.remainder(total, 2 * math.pi).to(dt.dtype)

    def _merge(self, y: Tensor, z: Tensor) -> Tensor:
        """Norm, gate and output projection."""
        y = y.flatten(-2)
        y = y * F.silu(z.to(y.dtype)) if self.norm is None else self.norm(y.to(z.dtype), z)
        return project(self.out_proj, y.to(z.dtype))

    def step(
        self, hidden_states: Tensor, angle: Tensor, ssm: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One token: hidden_states (batch, 1, d_model). Returns the output and the states, updated in place."""
        check_one_token("hidden_states", hidden_states, self.d_model)
        z, tokens = self._project(hidden_states.squeeze(1))
        x, k_now, q, A, dt, lam, theta = tokens
        with torch.no_grad():
            angle.copy_(torch.remainder(angle + dt[..., None] * theta[:, None], 2 * math.pi))
            cos, sin = angle.cos(), angle.sin()
            k_now, q = rotate(k_now, cos, sin), rotate(q, cos, sin)
            # The token before gets its second share here, and all of it the decay of the step.
            ssm.add_(torch.einsum("bh,bhp,bhn->bhpn", dt * (1 - lam), v.to(x.dtype), k[:, 0].to(x.dtype)))
            rate = -torch.ones_like(self.D, dtype=x.dtype)
            y = ssd_step(ssm, x * (lam / -A)[..., None], -A * dt, rate, k_now, q, backend=self.backend)
            k.copy_(k_now.unsqueeze(1))
            v.copy_(x)
        y = y + self.D.to(x.dtype)[:, None] * x
        return self._merge(y, z).unsqueeze(1), angle, ssm, k, v

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> Mamba3State:
        """The zero states; `dtype` is that of v, the others are fp32, or fp64 in a float64 layer.

        max_seqlen is accepted for compatibility: the states do not grow.
        """
        weight, shapes = self.in_proj.weight, self._state_shapes(batch_size)
        wide = acc_dtype(weight.dtype)
        dtypes = (wide, wide, wide, dtype or weight.dtype)
        return Mamba3State(*(weight.new_zeros(shape, dtype=kind) for shape, kind in zip(shapes, dtypes, strict=True)))

    def _state_shapes(self, nseq: int) -> tuple[tuple[int, ...], ...]:
        """Of angle, ssm, k and v."""
        heads = (nseq, self.nheads)
        ssm, k = (*heads, self.headdim, self.d_state), (nseq, 1, self.nheads, self.d_state)
        return (*heads, self.nangles), ssm, k, (*heads, self.headdim)

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, expand={self.expand}, headdim={self.headdim}, "
            f"ngroups={self.ngroups}, nangles={self.nangles}"
        )


def decay_rate(a: Tensor) -> Tensor:
    """1 + a for a >= 0 and 1 / (1 - a) below: positive, and heavy-tailed on both sides."""
    return a.clamp(min=0) + 1 / (1 - a.clamp(max=0))


def rotate(weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of (..., d_state) by angles (..., nangles); what is left over stays."""
    nangles = cos.shape[-1]
    pairs, rest = weight.split((2 * nangles, weight.shape[-1] - 2 * nangles), dim=-1)
    even, odd = pairs.unflatten(-1, (nangles, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([turned.flatten(-2), rest], dim=-1)
