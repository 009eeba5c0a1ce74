"""selective_scan: bound by arithmetic on a CPU, one exponential and three multiply-adds per state and token."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import selective_scan
from ssmkit.ops._walk import ScanOutput
from ssmkit.testing import selective_scan_inputs

from . import Absent, Bench, Prepared, Rival, compiled_anew, ggml, official, register
from .reference import carried

VLLM_SCAN = "vllm.model_executor.layers.mamba.ops.selective_scan_triton"
CHUNK = 256  # tokens of the reference between two checkpoints


def carried_reference(**inputs: Any) -> Tensor:
    """The op's float64 reference, a chunk of tokens at a time with the state carried, so that gradients fit in memory."""

    def scan(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        part = {name: t[:, tokens] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
        scanned = selective_scan(**part, initial_state=state, return_final_state=True, backend="reference")
        assert isinstance(scanned, ScanOutput)
        return scanned

    return carried(scan, inputs["x"].shape[1], CHUNK)


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
# Each rival below imports what it needs when called, and returns its adapter.
Import = Callable[[], Adapter]


def mamba_ssm_reference() -> Adapter:
    reference = official.mamba_ssm("ops.selective_scan_interface").selective_scan_ref

    def call(s: Scan) -> Tensor:
        x, dt, B, C = s.channels_first()
        return reference(x, dt, s.A, B, C, s.D, None, s.dt_bias, s.dt_softplus).transpose(1, 2)

    return call


def mambapy_pscan() -> Adapter:
    pscan = importlib.import_module("mambapy.pscan").pscan
    return lambda s: s.output(pscan(*s.discretised()))


def transformers_scan(**options: bool) -> Import:
    """The scan of transformers' MambaMixer on the path that `options` choose."""

    def load() -> Adapter:
        scan = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan

        def call(s: Scan) -> Tensor:
            x, dt, B, C = s.channels_first()
            bias = {"delta_bias": s.dt_bias, "delta_softplus": s.dt_softplus}
            return scan(x, dt, s.A, B, C, s.D, **bias, **options).transpose(1, 2)

        return call

    return load


def associative_scan() -> Adapter:
    scan = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lambda s: s.output(scan(combine, s.discretised(), dim=1, combine_mode="generic")[1])


def eager(load: Import, **options: Any) -> Rival:
    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = load()
        return Prepared(lambda: call(Scan(**inputs)))

    return Rival(prepare=prepare, **options)


def compiled(load: Import, **options: Any) -> Rival:
    """Through torch.compile, each shape and mode compiled anew."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = compiled_anew(load())
        return Prepared(lambda: call(Scan(**inputs)))

    return Rival(prepare=prepare, **options)


def sequences_contiguous(load: Import, **options: Any) -> Rival:
    """For GPU kernels that walk along memory: the Scan's tensors are laid out (batch, channels, seqlen) beforehand."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        call = load()
        tokens = dict(zip(("x", "dt", "B", "C"), Scan(**inputs).channels_first(), strict=True))
        laid = {name: t.detach().contiguous().requires_grad_(t.requires_grad) for name, t in tokens.items()}
        scan = Scan(**{**inputs, **laid})

        def finish(results: dict[str, Tensor]) -> dict[str, Tensor]:
            ours = dict(results)
            for name in {"y", "dx", "ddt", "dB", "dC"} & results.keys():
                ours[name] = results[name].transpose(1, 2)
            for name in {"dB", "dC"} & results.keys():
                ours[name] = ours[name].unsqueeze(2)
            return ours

        return Prepared(lambda: call(scan), leaves={**inputs, **laid}, finish=finish)

    return Rival(prepare=prepare, device="cuda", **options)


def mamba_ssm_cuda() -> Adapter:
    selective_scan_fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def call(s: Scan) -> Tensor:
        return selective_scan_fn(s.x, s.dt, s.A, s.B, s.C, s.D, None, s.dt_bias, s.dt_softplus)

    return call


def vmamba_cuda() -> Adapter:
    extension = importlib.import_module("selective_scan_cuda_oflex")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, softplus: bool, *tensors: Tensor) -> Tensor:
            x, dt, A, B, C, D, bias = tensors
            y, states, *_ = extension.fwd(x, dt, A, B[:, None], C[:, None], D, bias, softplus, 1, True)
            ctx.softplus = softplus
            ctx.save_for_backward(*tensors, states)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, dt, A, B, C, D, bias, states = ctx.saved_tensors
            inputs = (x, dt, A, B[:, None], C[:, None], D, bias, dy.contiguous(), states)
            dx, ddt, dA, dB, dC, dD, dbias, *_ = extension.bwd(*inputs, ctx.softplus, 1)
            return None, dx, ddt, dA, dB[:, 0], dC[:, 0], dD, dbias

    def call(s: Scan) -> Tensor:
        return Function.apply(s.dt_softplus, s.x, s.dt, s.A, s.B, s.C, s.D, s.dt_bias)

    return call


def vllm_triton() -> Adapter:
    selective_scan = importlib.import_module(VLLM_SCAN).selective_scan_fwd_triton

    def call(s: Scan) -> Tensor:
        # It writes y over dt.
        y, state = s.dt.clone(), s.x.new_zeros(s.x.shape[0], *s.A.shape, dtype=torch.float32)
        selective_scan(
            s.x, y, s.A, s.B[:, None], s.C[:, None], s.D, None, s.dt_bias, s.dt_softplus, None, None, None, state, -1
        )
        return y

    return call


def loop_declines(seqlen: int, mode: str) -> str | None:
    """Each step's indexing gets a gradient of full size: a quarter of a minute of backward at a thousand tokens."""
    if mode == "fwdbwd" and seqlen > 512:
        return f"its backward is quadratic in length; not run at {seqlen} tokens"
    return None


def ggml_scan(inputs: dict[str, Any]) -> Prepared:
    """ggml's `ssm_scan`, which adds neither bias nor D: the bias goes in before, D x is added after, both untimed."""
    x, dt, D = inputs["x"], inputs["dt"] + inputs["dt_bias"], inputs["D"]
    if not inputs["dt_softplus"]:
        raise Absent("ssm_scan always applies softplus")
    scan = ggml.selective_scan(x, dt, inputs["A"], inputs["B"], inputs["C"], threads=torch.get_num_threads())
    return replace(scan, finish=lambda results: {"y": results["y"] + D * x})


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
        parameters=("A", "D", "dt_bias"),
        bytes_moved=bytes_moved,
        exps=states,
        fmas=multiply_adds,
        reference=carried_reference,
        rivals={
            "mamba_ssm reference": eager(mamba_ssm_reference, declines=loop_declines),
            "mambapy pscan": eager(mambapy_pscan),
            "transformers loop": eager(transformers_scan(), declines=loop_declines),
            "transformers mambapy path": eager(transformers_scan(use_mambapy=True)),
            "transformers associative_scan (compiled)": compiled(transformers_scan(use_associative_scan=True)),
            "torch associative_scan (compiled)": compiled(associative_scan),
            "ggml ssm_scan": Rival(prepare=ggml_scan, modes=("fwd",), note="bias and D outside the timing"),
            "mamba_ssm CUDA": sequences_contiguous(mamba_ssm_cuda),
            "VMamba CUDA": sequences_contiguous(vmamba_cuda),
            "vLLM Triton": sequences_contiguous(vllm_triton, modes=("fwd",), note="a copy of dt in the timing"),
        },
    )
)
