"""selective_scan: bound by arithmetic on a CPU, one exponential and three multiply-adds per state and token."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmkit.ops.selective_scan import ScanOutput, selective_scan
from ssmkit.testing import selective_scan_inputs

from . import Absent, Bench, Prepared, Rival, ggml, register

CHUNK = 256  # tokens of the reference between two checkpoints


def carried_reference(**inputs: Any) -> Tensor:
    """The op's float64 reference, a chunk of tokens at a time with the state carried, so that gradients fit in memory."""
    tokens = ("x", "dt", "B", "C")
    y, state = [], None

    def chunk(begin: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        part = {name: value[:, begin : begin + CHUNK] if name in tokens else value for name, value in inputs.items()}
        scanned = selective_scan(**part, initial_state=state, return_final_state=True, backend="reference")
        assert isinstance(scanned, ScanOutput)
        return scanned

    for begin in range(0, inputs["x"].shape[1], CHUNK):
        y_chunk, state = checkpoint(chunk, begin, state, use_reentrant=False)
        y.append(y_chunk)
    return torch.cat(y, dim=1)


class Scan(NamedTuple):
    """The inputs as the rivals are given them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_softplus: bool

    def channels_first(self) -> list[Tensor]:
        """x, dt, B and C as (batch, channels, seqlen): views of memory whose channels lie side by side."""
        return [t.flatten(2).transpose(1, 2) for t in (self.x, self.dt, self.B, self.C)]

    def discretised(self) -> tuple[Tensor, Tensor]:
        """Decay and input of every state, (batch, seqlen, dim, dstate)."""
        dt = self.dt + self.dt_bias
        dt = F.softplus(dt) if self.dt_softplus else dt
        return torch.exp(dt[..., None] * self.A), (dt[..., None] * self.B) * self.x[..., None]

    def output(self, h: Tensor) -> Tensor:
        """y of all states."""
        return (h @ self.C.transpose(2, 3)).squeeze(3) + self.D * self.x


Adapter = Callable[[Scan], Tensor]


def mamba_ssm_reference(scan: Scan) -> Tensor:
    x, dt, B, C = scan.channels_first()
    reference = mamba_ssm_interface().selective_scan_ref
    return reference(x, dt, scan.A, B, C, scan.D, None, scan.dt_bias, scan.dt_softplus).transpose(1, 2)


@cache
def mamba_ssm_interface() -> ModuleType:
    """mamba_ssm's file with the reference, importable on a machine without the CUDA extension that it also imports.

    The package's own __init__, which imports every model, is passed over; an empty module stands for the extension.
    """
    package = importlib.util.find_spec("mamba_ssm")
    if package is None or not package.submodule_search_locations:
        raise Absent("pip install --no-deps mamba-ssm (MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE without CUDA)")
    bare = ModuleType("mamba_ssm")
    bare.__path__ = list(package.submodule_search_locations)
    sys.modules.setdefault("mamba_ssm", bare)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface")


def mambapy_pscan(scan: Scan) -> Tensor:
    from mambapy.pscan import pscan

    return scan.output(pscan(*scan.discretised()))


def transformers_scan(**options: bool) -> Adapter:
    """The scan of transformers' MambaMixer on the path that `options` choose."""

    def scan_(scan: Scan) -> Tensor:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        x, dt, B, C = scan.channels_first()
        bias = {"delta_bias": scan.dt_bias, "delta_softplus": scan.dt_softplus}
        return mamba_selective_scan(x, dt, scan.A, B, C, scan.D, **bias, **options).transpose(1, 2)

    return scan_


def associative_scan(scan: Scan) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = associative_scan(combine, scan.discretised(), dim=1, combine_mode="generic")
    return scan.output(h)


def eager(adapter: Adapter, **options: Any) -> Rival:
    return Rival(call=lambda **inputs: adapter(Scan(**inputs)), **options)


def compiled(adapter: Adapter, **options: Any) -> Rival:
    """Through torch.compile, each shape and mode compiled anew."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        torch._dynamo.reset()
        call = torch.compile(adapter, dynamic=False)
        return Prepared(lambda: call(Scan(**inputs)))

    return Rival(prepare=prepare, **options)


def cuda_kernel(module: str, function: str) -> Rival:
    """A kernel called as mamba_ssm's: (u, delta, A, B, C, D, delta_bias=, delta_softplus=), sequences contiguous."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        kernel = getattr(importlib.import_module(module), function)

        def call() -> Tensor:
            scan = Scan(**inputs)
            x, dt, B, C = (t.contiguous() for t in scan.channels_first())
            y = kernel(x, dt, scan.A, B, C, scan.D, delta_bias=scan.dt_bias, delta_softplus=scan.dt_softplus)
            return y.transpose(1, 2)

        return Prepared(call)

    return Rival(prepare=prepare, device="cuda")


def loop_declines(seqlen: int, mode: str) -> str | None:
    """Each step's indexing gets a gradient of full size: minutes of backward at a few thousand tokens."""
    if mode == "fwdbwd" and seqlen > 1024:
        return f"its backward is quadratic in length; not run at {seqlen} tokens"
    return None


def ggml_scan(inputs: dict[str, Any]) -> Prepared:
    """ggml's `ssm_scan`, which adds neither bias nor D: the bias goes in before, D x is added after, both untimed."""
    x, dt, D = inputs["x"], inputs["dt"] + inputs["dt_bias"], inputs["D"]
    if not inputs["dt_softplus"]:
        raise Absent("ssm_scan always applies softplus")
    scan = ggml.selective_scan(x, dt, inputs["A"], inputs["B"], inputs["C"], threads=torch.get_num_threads())
    return replace(scan, finish=lambda y: y + D * x)


def states(batch: int, seqlen: int, dim: int, dstate: int, mode: str) -> float:
    """States computed: once forward; in backward once more, as they are not kept."""
    return batch * seqlen * dim * dstate * (1 if mode == "fwd" else 2)


def multiply_adds(batch: int, seqlen: int, dim: int, dstate: int, mode: str) -> float:
    """Per state and token: h = a h + b x and y = C.h, three forward; backward computes h again (2) and the gradients of
    h (2: C dy, a dh), C (1), B (1), x through b (1), a (1), dt (1) and A (1)."""
    return batch * seqlen * dim * dstate * (3 if mode == "fwd" else 3 + 10)


def bytes_moved(batch: int, seqlen: int, dim: int, dstate: int, dtype: torch.dtype, mode: str) -> float:
    """Forward x, dt in and y out, B and C; backward x, dt and dy in, dx and ddt out, B, C and their gradients."""
    wide, narrow = (3, 2) if mode == "fwd" else (3 + 5, 2 + 4)
    return batch * seqlen * (wide * dim + narrow * dstate) * dtype.itemsize


register(
    Bench(
        op=selective_scan,
        inputs=selective_scan_inputs,
        shapes={
            "Mamba-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "dim": 1536, "dstate": 16},
            "Mamba-130M, 4096 tokens": {"batch": 1, "seqlen": 4096, "dim": 1536, "dstate": 16},
            "Mamba of width 384, short prompts": {"batch": 8, "seqlen": 64, "dim": 768, "dstate": 16},
            "Decision Mamba, 20 steps of 3 tokens": {"batch": 64, "seqlen": 60, "dim": 256, "dstate": 16},
            "Vim-Ti, 224x224 image": {"batch": 4, "seqlen": 197, "dim": 384, "dstate": 16},
        },
        fixed={"optional": ("D", "dt_bias"), "requires_grad": False},
        bytes_moved=bytes_moved,
        exps=states,
        fmas=multiply_adds,
        reference=carried_reference,
        rivals={
            "mamba_ssm reference": eager(mamba_ssm_reference, declines=loop_declines),
            "mambapy pscan": eager(mambapy_pscan),
            "transformers loop": eager(transformers_scan(), declines=loop_declines),
            "transformers mambapy path": eager(transformers_scan(use_mambapy=True)),
            "transformers associative_scan, compiled": compiled(transformers_scan(use_associative_scan=True)),
            "torch associative_scan, compiled": compiled(associative_scan),
            "ggml ssm_scan": Rival(prepare=ggml_scan, modes=("fwd",), note="bias and D outside the timing"),
            "mamba_ssm CUDA": cuda_kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
            "VMamba CUDA": cuda_kernel("selective_scan_cuda_oflex", "selective_scan_fn"),
        },
    )
)
