"""linear_scan: memory-bound, a and b once in and h once out. `--dtype complex64` is S5's case."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkit.ops import linear_scan
from ssmkit.testing import linear_scan_inputs

from . import Absent, Bench, Prepared, Rival, compiled_anew, register

Scan = Callable[[Tensor, Tensor], Tensor]


def torch_loop(a: Tensor, b: Tensor) -> Tensor:
    """One token at a time."""
    h, states = torch.zeros_like(b[:, 0]), []
    for a_BD, b_BD in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_BD * h + b_BD
        states.append(h)
    return torch.stack(states, dim=1)


def associative_scan(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's own parallel scan."""
    scan = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return scan(combine, (a, b), dim=1, combine_mode="generic")[1]


def compiled(scan: Scan, **options: Any) -> Rival:
    """Through torch.compile, each shape and mode compiled anew."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = compiled_anew(scan)
        return Prepared(lambda: call(**inputs))

    return Rival(prepare=prepare, **options)


def mambapy_pscan(a: Tensor, b: Tensor) -> Tensor:
    """mamba.py's parallel scan, of one state per channel."""
    return importlib.import_module("mambapy.pscan").pscan(a[..., None], b[..., None]).squeeze(3)


def accelerated_scan(inputs: dict[str, Any]) -> Prepared:
    """The CUDA kernel of accelerated-scan, which walks along memory: laid out (batch, channels, seqlen) beforehand."""
    try:
        scan = importlib.import_module("accelerated_scan.warp").scan
    except ImportError as missing:
        raise Absent(f"pip install accelerated-scan ({missing})") from None
    laid = {name: t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for name, t in inputs.items()}

    def finish(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.transpose(1, 2) for name, value in results.items()}

    return Prepared(lambda: scan(laid["a"], laid["b"]), leaves=laid, finish=finish)


def real_only(dtype: torch.dtype) -> str | None:
    """For a rival whose gradients ignore conjugation."""
    return "real numbers only" if dtype.is_complex else None


def powers_of_two(dtype: torch.dtype, seqlen: int) -> str | None:
    """accelerated-scan's lengths."""
    return "lengths that are a power of 2 from 32 on" if seqlen < 32 or seqlen & (seqlen - 1) else real_only(dtype)


def inputs(batch: int, seqlen: int, dim: int, **options: Any) -> dict[str, Tensor]:
    """The tests' inputs: a per token and b."""
    return linear_scan_inputs(batch, seqlen, dim, optional=(), **options)


def bytes_moved(batch: int, seqlen: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """a, b and h; backward reads dh, a and h and writes da and db."""
    return batch * seqlen * dim * dtype.itemsize * (3 if mode == "fwd" else 8)


register(
    Bench(
        op=linear_scan,
        inputs=inputs,
        shapes={
            "Gated linear RNN, 4096 tokens": {"batch": 1, "seqlen": 4096, "dim": 1536},
            "Gated linear RNN, 16 x 1024 tokens": {"batch": 16, "seqlen": 1024, "dim": 384},
            "S5 in reinforcement learning, 64 x 1024 tokens": {"batch": 64, "seqlen": 1024, "dim": 128},
            "Decision model, 64 x 60 tokens": {"batch": 64, "seqlen": 60, "dim": 256},
            "One long sequence, few channels": {"batch": 1, "seqlen": 65536, "dim": 16},
        },
        fixed={"requires_grad": False},
        bytes_moved=bytes_moved,
        rivals={
            "torch loop": Rival(
                call=torch_loop, declines=lambda seqlen: "a loop of minutes" if seqlen > 4096 else None
            ),
            "torch associative_scan": associative_scan,
            "torch associative_scan (compiled)": compiled(associative_scan),
            "mambapy pscan": Rival(call=mambapy_pscan, declines=real_only),
            "accelerated-scan CUDA": Rival(prepare=accelerated_scan, device="cuda", declines=powers_of_two),
        },
    )
)
