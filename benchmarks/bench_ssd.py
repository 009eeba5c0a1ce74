"""ssd: bound by its matrix products on a CPU, two multiply-adds per state and token and those within a chunk."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ssmkit.ops._ssd_reference import ssd_quadratic
from ssmkit.ops.ssd import AUTO_CHUNK, ssd
from ssmkit.testing import ssd_inputs

from . import Absent, Bench, Prepared, Rival, compiled_anew, ggml, official, register
from .reference import carried


def carried_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    """The op's float64 quadratic form, a chunk at a time with the state carried, so that it fits in memory."""
    options = (None, None, None, dt_softplus, 0.0, math.inf, False, False)
    D_HP = D[:, None].expand(*x.shape[2:])
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float64)

    def scan(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        x_, dt_, B_, C_ = (t[:, tokens].double() for t in (x, dt, B, C))
        return ssd_quadratic(x_, dt_, A, B_, C_, D_HP, None, dt_bias, state, *options)

    return carried(scan, x.shape[1], AUTO_CHUNK, state)


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
# Each rival below imports what it needs when called, and returns its adapter.
Import = Callable[[], Adapter]


def official_listing(chunk: int) -> Import:
    """The paper's listing as its authors publish it; the last chunk padded with dt = 0."""

    def load() -> Adapter:
        listing = official.mamba_ssm("modules.ssd_minimal").ssd_minimal_discrete

        def call(s: Duality) -> Tensor:
            dt, seqlen, (B, C) = s.steps(), s.x.shape[1], s.per_head()
            whole = [(s.x * dt[..., None]).to(s.x.dtype), (dt * s.A).to(s.x.dtype), B, C]
            padded = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, -seqlen % chunk)) for t in whole]
            return listing(*padded, chunk)[0][:, :seqlen] + s.skip()

        return call

    return load


def official_reference(chunk: int) -> Import:
    def load() -> Adapter:
        reference = official.mamba_ssm("ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
        return lambda s: reference(s.x, s.dt, s.A, s.B, s.C, chunk, s.D, None, s.dt_bias, s.dt_softplus)

    return load


def transformers_scan(chunk: int) -> Import:
    """The torch path of transformers' Mamba2Mixer."""

    def load() -> Adapter:
        scan = importlib.import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
        return lambda s: scan(
            s.x, s.dt, s.A, s.B, s.C, chunk, D=s.D, dt_bias=s.dt_bias, dt_softplus=s.dt_softplus
        )  # fmt: skip

    return load


def fla_naive_chunk(chunk: int) -> Import:
    def load() -> Adapter:
        naive = importlib.import_module("fla.ops.simple_gla.naive").naive_chunk_simple_gla

        def call(s: Duality) -> Tensor:
            dt, (B, C) = s.steps(), s.per_head()
            return naive(C, B, s.x * dt[..., None], dt * s.A, chunk_size=chunk, scale=1.0)[0] + s.skip()

        return call

    return load


def attention() -> Adapter:
    """torch's causal attention with C, B and x as queries, keys and values."""

    def call(s: Duality) -> Tensor:
        B, C = s.per_head()
        queries, keys, values = (t.transpose(1, 2) for t in (C, B, s.x))
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2)

    return call


def fla_triton() -> Adapter:
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def call(s: Duality) -> Tensor:
        dt, (B, C) = s.steps(), s.per_head()
        return chunk_simple_gla(C, B, (s.x * dt[..., None]).to(s.x.dtype), dt * s.A, scale=1.0)[0] + s.skip()

    return call


def mamba_ssm_triton() -> Adapter:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda s: scan(s.x, s.dt, s.A, s.B, s.C, 256, D=s.D, dt_bias=s.dt_bias, dt_softplus=s.dt_softplus)


def vllm_triton(chunk: int) -> Import:
    """vLLM's kernels for packed sequences: one sequence after another in a row, chunks listed by their offsets."""

    def load() -> Adapter:
        name = "vllm.model_executor.layers.mamba.ops.ssd_combined"
        scan = importlib.import_module(name).mamba_chunk_scan_combined_varlen

        def call(s: Duality) -> Tensor:
            batch, seqlen = s.x.shape[:2]
            begins = [row * seqlen + at for row in range(batch) for at in range(0, seqlen, chunk)]
            each = -(-seqlen // chunk)

            def table(values: list[int]) -> Tensor:
                return torch.tensor(values, dtype=torch.int32, device=s.x.device)

            out = torch.empty_like(s.x)
            scan(
                s.x.flatten(0, 1), s.dt.flatten(0, 1), s.A, s.B.flatten(0, 1), s.C.flatten(0, 1), chunk,
                cu_seqlens=table([row * seqlen for row in range(batch + 1)]),
                cu_chunk_seqlens=table([*begins, batch * seqlen]),
                last_chunk_indices=table([(row + 1) * each - 1 for row in range(batch)]),
                seq_idx=table([index // each for index in range(len(begins))]),
                out=out.flatten(0, 1), D=s.D, dt_bias=s.dt_bias, dt_softplus=s.dt_softplus,
            )  # fmt: skip
            return out

        return call

    return load


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


def eager(load: Import, **options: Any) -> Rival:
    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = load()
        return Prepared(lambda: call(Duality(**inputs)))

    return Rival(prepare=prepare, **options)


def compiled(load: Import, **options: Any) -> Rival:
    """Through torch.compile, each shape and mode compiled anew."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = compiled_anew(load())
        return Prepared(lambda: call(Duality(**inputs)))

    return Rival(prepare=prepare, **options)


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
        parameters=("A", "D", "dt_bias"),
        rounds_operands=True,
        bytes_moved=bytes_moved,
        exps=exponentials,
        products=products,
        reference=carried_reference,
        rivals={
            "official ssd_minimal": eager(official_listing(64)),
            "official ssd_minimal (compiled)": compiled(official_listing(64)),
            "official combined reference": eager(
                official_reference(64), declines=lambda seqlen: "takes whole chunks only" if seqlen % 64 else None
            ),
            "transformers in chunks of 64": eager(transformers_scan(64)),
            "transformers in chunks of 64 (compiled)": compiled(transformers_scan(64)),
            "transformers": eager(transformers_scan(256), note="chunks of 256, its default"),
            "fla naive_chunk_simple_gla": eager(fla_naive_chunk(64)),
            "ggml ssm_scan": Rival(prepare=ggml_scan, modes=("fwd",), note="bias and D outside the timing"),
            "causal attention of the same width": eager(attention, contrast=True, note="for contrast: another map"),
            "mamba_ssm Triton": eager(mamba_ssm_triton, device="cuda"),
            "fla chunk_simple_gla": eager(fla_triton, device="cuda"),
            "vLLM Triton": eager(vllm_triton(256), device="cuda", modes=("fwd",), note="its tables in the timing"),
        },
    )
)
