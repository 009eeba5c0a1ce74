"""causal_conv1d with SiLU: one read and one write at best, and on a CPU one exponential per element beside it."""

import importlib.util
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import causal_conv1d
from ssmkit.testing import causal_conv1d_inputs

from . import Absent, Bench, Prepared, Rival, compiled_anew, ggml, register


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """PyTorch's depthwise convolution, as transformers' layers call it, on a view with channels adjacent."""
    seqlen, (dim, width) = x.shape[1], weight.shape
    kernel, shift = weight.to(x.dtype).unsqueeze(1), bias.to(x.dtype)
    y = F.conv1d(x.transpose(1, 2), kernel, shift, padding=width - 1, groups=dim)[..., :seqlen]
    return F.silu(y).transpose(1, 2)


def tokens_adjacent(inputs: dict[str, Any]) -> Prepared:
    """The same on memory laid out (batch, dim, seqlen) beforehand."""
    laid = inputs["x"].detach().transpose(1, 2).contiguous().requires_grad_(inputs["x"].requires_grad)

    def finish(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.transpose(1, 2) if name == "dx" else t for name, t in results.items()}

    def call() -> Tensor:
        return torch_conv1d(**{**inputs, "x": laid.transpose(1, 2)})

    return Prepared(call, leaves={**inputs, "x": laid}, finish=finish)


def shifts(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The sum over the taps, each a shifted view of the padded input: what a compiler can make one loop of."""
    seqlen, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = bias + sum(weight[:, j] * padded[:, j : j + seqlen] for j in range(width))
    return F.silu(y).to(x.dtype)


def compiled_shifts(inputs: dict[str, Any]) -> Prepared:
    """`shifts` through torch.compile, each shape and mode compiled anew."""
    call = compiled_anew(shifts)
    return Prepared(lambda: call(**inputs))


def ggml_conv(inputs: dict[str, Any]) -> Prepared:
    """ggml's `ssm_conv`, which adds no bias and has no activation: both come after it, untimed."""
    conv = ggml.causal_conv1d(inputs["x"], inputs["weight"], threads=torch.get_num_threads())
    return replace(conv, finish=lambda results: {"y": F.silu(results["y"] + inputs["bias"])})


def package(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The package causal-conv1d, channels last as here."""
    if importlib.util.find_spec("causal_conv1d") is None:
        raise Absent("pip install causal-conv1d (CUDA only)")
    y = causal_conv1d(x, weight, bias, activation="silu", backend="causal_conv1d")
    assert isinstance(y, Tensor)
    return y


def bytes_moved(batch: int, seqlen: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """Forward x in, y out; backward x and dy in, dx out."""
    return batch * seqlen * dim * dtype.itemsize * (2 if mode == "fwd" else 2 + 3)


def exps(batch: int, seqlen: int, dim: int, mode: str) -> int:
    """One for the activation, one more for its slope in backward, which recomputes it."""
    return batch * seqlen * dim * (1 if mode == "fwd" else 2)


def multiply_adds(batch: int, seqlen: int, dim: int, width: int, mode: str) -> int:
    """One per tap; backward computes the sum again and adds up dx and dweight."""
    return batch * seqlen * dim * width * (1 if mode == "fwd" else 1 + 3)


register(
    Bench(
        op=causal_conv1d,
        inputs=causal_conv1d_inputs,
        shapes={
            "Mamba-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "dim": 1536, "width": 4},
            "Mamba-130M, 4096 tokens": {"batch": 1, "seqlen": 4096, "dim": 1536, "width": 4},
            "Mamba of width 384, short prompts": {"batch": 8, "seqlen": 64, "dim": 768, "width": 4},
            "Decision Mamba, 20 steps of 3 tokens": {"batch": 64, "seqlen": 60, "dim": 256, "width": 4},
            "Vim-Ti, 224x224 image": {"batch": 4, "seqlen": 197, "dim": 384, "width": 4},
        },
        fixed={"optional": ("bias",), "requires_grad": False},
        parameters=("weight", "bias"),
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=multiply_adds,
        rivals={
            "torch conv1d + silu, channels adjacent": torch_conv1d,
            "torch conv1d + silu, tokens adjacent": Rival(prepare=tokens_adjacent),
            "torch shifts (compiled)": Rival(prepare=compiled_shifts),
            "ggml ssm_conv": Rival(prepare=ggml_conv, modes=("fwd",), note="bias and SiLU outside the timing"),
            "causal-conv1d CUDA": Rival(call=package, device="cuda"),
        },
    )
)
