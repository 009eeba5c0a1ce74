"""ssd_step: one token. The state is read and written once; the rest is small."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import ssd_step
from ssmkit.testing import ssd_step_inputs

from . import Absent, Bench, Prepared, Rival, compiled_anew, ggml, register


def torch_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, **_: bool
) -> Tensor:
    """The equations in plain torch, as models without a kernel write them."""
    times = x.shape[1] // B.shape[1]
    B, C = (weight.repeat_interleave(times, dim=1) for weight in (B, C))
    dt = F.softplus(dt + dt_bias)
    h = torch.exp(dt * A)[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None]
    state.copy_(h)
    return (h @ C[..., None]).squeeze(-1) + D[:, None] * x


def compiled_step(inputs: dict[str, Any]) -> Prepared:
    """The same through torch.compile."""
    call = compiled_anew(torch_step)
    return Prepared(lambda: call(**inputs))


def official_arguments(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """As Mamba-2's own layer calls `selective_state_update`: one value per head, of stride zero over its channels."""
    channels, states = x.shape[2], state.shape[3]
    dt, D, dt_bias = (t[..., None].expand(*t.shape, channels) for t in (dt, D, dt_bias))
    A = A[:, None, None].expand(-1, channels, states)
    return (state, x, dt, A, B, C), {"D": D, "z": None, "dt_bias": dt_bias, "dt_softplus": dt_softplus}


def transformers_step(**inputs: Any) -> Tensor:
    from transformers.models.mamba2 import modeling_mamba2

    tensors, options = official_arguments(**inputs)
    return modeling_mamba2.mamba2_selective_state_update(*tensors, **options)


def mamba_ssm_step(name: str) -> Rival:
    """mamba_ssm's Triton kernel, or the torch form that its tests compare it with."""

    def call(**inputs: Any) -> Tensor:
        module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
        tensors, options = official_arguments(**inputs)
        return getattr(module, name)(*tensors, **options)

    return Rival(call=call, modes=("fwd",), device="cuda" if name == "selective_state_update" else "cpu")


def ggml_step(inputs: dict[str, Any]) -> Prepared:
    """ggml's `ssm_scan` over one token. It returns the new state beside y and adds neither bias nor D."""
    state, x, dt, A, B, C = (inputs[name] for name in ("state", "x", "dt", "A", "B", "C"))
    if x.dtype != torch.float32:
        raise Absent("ssm_scan takes float32 only")
    (batch, nheads, headdim), (ngroups, dstate) = x.shape, B.shape[1:]
    context = ggml.Context(4 * (4 * state.numel() + 8 * x.numel() + 4 * B.numel()) + 2**26)
    result = context.base.ggml_ssm_scan(
        context.handle,
        context.tensor(state, dstate, headdim, nheads, batch),
        context.tensor(x, headdim, nheads, 1, batch),
        context.tensor(dt + inputs["dt_bias"], nheads, 1, batch),
        context.tensor(A, 1, nheads),
        context.tensor(B, dstate, ngroups, 1, batch),
        context.tensor(C, dstate, ngroups, 1, batch),
        context.tensor(torch.arange(batch, dtype=torch.int32), batch),
        1,
    )
    graph, threads = context.graph(result), torch.get_num_threads()

    def run() -> Tensor:
        context.compute(graph, threads)
        return context.read(result, x.numel()).view(x.shape)

    def with_skip(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return results | {"y": results["y"] + inputs["D"][:, None] * x}

    return Prepared(run, note=ggml.version(), held=context.nbytes, finish=with_skip)


def bytes_moved(batch: int, nheads: int, headdim: int, dstate: int, dtype: torch.dtype) -> int:
    """The state twice in fp32, x and y, B and C once."""
    return batch * (8 * nheads * headdim * dstate + (2 * nheads * headdim + 2 * dstate) * dtype.itemsize)


register(
    Bench(
        op=ssd_step,
        inputs=ssd_step_inputs,
        shapes={
            "Mamba2-130M, one sequence": {"batch": 1, "nheads": 24, "headdim": 64, "dstate": 128},
            "Mamba2-2.7B, one sequence": {"batch": 1, "nheads": 80, "headdim": 64, "dstate": 128},
            "Mamba2-130M, 16 sequences": {"batch": 16, "nheads": 24, "headdim": 64, "dstate": 128},
        },
        fixed={"optional": ("D", "dt_bias")},
        bytes_moved=bytes_moved,
        modes=("fwd",),
        rivals={
            "torch": torch_step,
            "torch.compile": Rival(prepare=compiled_step, modes=("fwd",)),
            "transformers": Rival(call=transformers_step, modes=("fwd",)),
            "mamba_ssm reference": mamba_ssm_step("selective_state_update_ref"),
            "ggml ssm_scan": Rival(prepare=ggml_step, modes=("fwd",), note="bias and D outside the timing"),
            "mamba_ssm Triton": mamba_ssm_step("selective_state_update"),
        },
    )
)
