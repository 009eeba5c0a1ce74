"""ssd: bound by its matrix products on a CPU, two multiply-adds per state and token and those within a chunk."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmkit.ops.ssd import AUTO_CHUNK, ssd, ssd_quadratic
from ssmkit.testing import ssd_inputs

from . import Absent, Bench, Prepared, Rival, ggml, register


def carried_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    """The op's float64 quadratic form, a chunk at a time with the state carried, so that it fits in memory."""
    options = (None, None, None, dt_softplus, 0.0, math.inf, False, False)
    D_HP = D[:, None].expand(*x.shape[2:])
    y, state = [], x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float64)

    def chunk(begin: int, state: Tensor) -> tuple[Tensor, Tensor]:
        x_, dt_, B_, C_ = (t[:, begin : begin + AUTO_CHUNK].double() for t in (x, dt, B, C))
        return ssd_quadratic(x_, dt_, A, B_, C_, D_HP, None, dt_bias, state, *options)

    for begin in range(0, x.shape[1], AUTO_CHUNK):
        y_chunk, state = checkpoint(chunk, begin, state, use_reentrant=False)
        y.append(y_chunk)
    return torch.cat(y, dim=1)


class Duality(NamedTuple):
    """The inputs as the rivals are given them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_softplus: bool

    def steps(self) -> Tensor:
        """dt as the recurrence uses it."""
        dt = self.dt + self.dt_bias
        return F.softplus(dt) if self.dt_softplus else dt

    def per_head(self) -> tuple[Tensor, Tensor]:
        """B and C of each head, (batch, seqlen, nheads, dstate)."""
        times = self.x.shape[2] // self.B.shape[2]
        B, C = (repeat(t, "b l g n -> b l (g r) n", r=times) for t in (self.B, self.C))
        return B, C

    def skip(self) -> Tensor:
        """D x."""
        return self.D[:, None] * self.x


Adapter = Callable[[Duality], Tensor]


def segsum(a: Tensor) -> Tensor:
    """(..., l) -> (..., l, l): entry t, s is a_{s+1} + ... + a_t, -inf for s > t; summed after masking."""
    size = a.shape[-1]
    rows = repeat(a, "... t -> ... t s", s=size)
    ones = torch.ones(size, size, dtype=torch.bool, device=a.device)
    total = rows.masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return total.masked_fill(~ones.tril(), -math.inf)


def minimal_listing(call: Duality, chunk: int) -> Tensor:
    """The four steps of the paper's listing in torch, written here; the last chunk padded with dt = 0."""
    dt, seqlen = call.steps(), call.x.shape[1]
    B, C = call.per_head()
    pad = -seqlen % chunk
    u, a = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad)) for t in (call.x * dt[..., None], dt * call.A))
    B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (B, C))
    u, B, C = (rearrange(t, "b (m q) h d -> b m q h d", q=chunk) for t in (u, B, C))
    a = rearrange(a, "b (m q) h -> b h m q", q=chunk)
    total = a.cumsum(-1)
    y = torch.einsum("bmthn,bmshn,bhmts,bmshp->bmthp", C, B, segsum(a).exp(), u)
    states = torch.einsum("bmshn,bhms,bmshp->bmhpn", B, (total[..., -1:] - total).exp(), u)
    passing = segsum(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzm,bmhpn->bzhpn", passing, F.pad(states, (0, 0) * 3 + (1, 0)))[:, :-1]
    y = y + torch.einsum("bmthn,bmhpn,bhmt->bmthp", C, states, total.exp())
    return rearrange(y, "b m q h p -> b (m q) h p")[:, :seqlen] + call.skip()


def transformers_scan(call: Duality, chunk: int) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(
        call.x, call.dt, call.A, call.B, call.C, chunk, D=call.D, dt_bias=call.dt_bias, dt_softplus=call.dt_softplus
    )


def fla_naive_chunk(call: Duality, chunk: int) -> Tensor:
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    dt, (B, C) = call.steps(), call.per_head()
    y, _ = naive_chunk_simple_gla(C, B, call.x * dt[..., None], dt * call.A, chunk_size=chunk, scale=1.0)
    return y + call.skip()


def fla_triton(call: Duality) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    dt, (B, C) = call.steps(), call.per_head()
    y, _ = chunk_simple_gla(C, B, (call.x * dt[..., None]).to(call.x.dtype), dt * call.A, scale=1.0)
    return y + call.skip()


def mamba_ssm_triton(call: Duality) -> Tensor:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, dt, A, B, C, D, dt_bias, dt_softplus = call
    return scan(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)


def ggml_scan(inputs: dict[str, Any]) -> Prepared:
    """ggml's `ssm_scan`, one decay per head; it adds neither bias nor D: both are added outside the timing."""
    call = Duality(**inputs)
    if call.x.dtype != torch.float32:
        raise Absent("ssm_scan takes float32 only")
    if not call.dt_softplus:
        raise Absent("ssm_scan always applies softplus")
    (batch, seqlen, nheads, headdim), (ngroups, dstate) = call.x.shape, call.B.shape[2:]
    state = batch * nheads * headdim * dstate
    context = ggml.Context(4 * (4 * call.x.numel() + 4 * call.B.numel() + 3 * state) + 2**26)
    result = context.base.ggml_ssm_scan(
        context.handle,
        context.tensor(torch.zeros(state), dstate, headdim, nheads, batch),
        context.tensor(call.x, headdim, nheads, seqlen, batch),
        context.tensor(call.dt + call.dt_bias, nheads, seqlen, batch),
        context.tensor(call.A, 1, nheads),
        context.tensor(call.B, dstate, ngroups, seqlen, batch),
        context.tensor(call.C, dstate, ngroups, seqlen, batch),
        context.tensor(torch.arange(batch, dtype=torch.int32), batch),
        1,
    )
    graph, threads = context.graph(result), torch.get_num_threads()

    def run() -> Tensor:
        context.compute(graph, threads)
        return context.read(result, call.x.numel()).view(call.x.shape)

    def with_skip(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return results | {"y": results["y"] + call.skip()}

    return replace(Prepared(run, note=ggml.version(), held=context.nbytes), finish=with_skip)


def eager(adapter: Adapter, **options: Any) -> Rival:
    return Rival(call=lambda **inputs: adapter(Duality(**inputs)), **options)


def products(batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, mode: str) -> float:
    """Multiply-adds of the causal chunked form, chunks of 64 and C B^T once per group of all heads.

    Forward, per token and head: state in and out (2 P N), half a chunk of values (P Q / 2). Backward: the gradients of
    state, x, B and C through the state (4 P N) and twice the products within the chunk (2 P Q / 2).
    """
    within = min(AUTO_CHUNK, seqlen) / 2
    shared = batch * seqlen * within * dstate
    forward = batch * seqlen * nheads * headdim * (2 * dstate + within) + shared
    if mode == "fwd":
        return forward
    return forward + batch * seqlen * nheads * headdim * (4 * dstate + 2 * within) + 3 * shared


def bytes_moved(
    batch: int, seqlen: int, nheads: int, headdim: int, dstate: int, dtype: torch.dtype, mode: str
) -> float:
    """Forward x in and y out, B, C and dt in; backward x and dy in, dx out, B, C, dt in and their gradients out."""
    wide, narrow = (2, 1) if mode == "fwd" else (2 + 3, 1 + 2)
    return batch * seqlen * (wide * nheads * headdim + narrow * (2 * dstate + nheads)) * dtype.itemsize


def exponentials(batch: int, seqlen: int, nheads: int, mode: str) -> float:
    """One decay for each pair of tokens of a chunk and head, once more in backward."""
    return batch * seqlen * nheads * min(AUTO_CHUNK, seqlen) / 2 * (1 if mode == "fwd" else 2)


register(
    Bench(
        op=ssd,
        inputs=ssd_inputs,
        shapes={
            "Mamba2-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "nheads": 24, "headdim": 64, "dstate": 128},
            "Mamba2-130M, 4096 tokens": {"batch": 1, "seqlen": 4096, "nheads": 24, "headdim": 64, "dstate": 128},
            "224x224 image, 12 heads of 32": {"batch": 4, "seqlen": 197, "nheads": 12, "headdim": 32, "dstate": 64},
        },
        fixed={"optional": ("D", "dt_bias"), "requires_grad": False},
        bytes_moved=bytes_moved,
        exps=exponentials,
        fmas=products,
        reference=carried_reference,
        rivals={
            "paper's listing, chunk 64": eager(partial(minimal_listing, chunk=64)),
            "transformers, chunk 64": eager(partial(transformers_scan, chunk=64)),
            "transformers, chunk 256 (its default)": eager(partial(transformers_scan, chunk=256)),
            "fla naive_chunk_simple_gla, chunk 64": eager(partial(fla_naive_chunk, chunk=64)),
            "ggml ssm_scan": Rival(prepare=ggml_scan, modes=("fwd",), note="bias and D outside the timing"),
            "mamba_ssm Triton": eager(mamba_ssm_triton, device="cuda"),
            "fla chunk_simple_gla": eager(fla_triton, device="cuda"),
        },
    )
)
