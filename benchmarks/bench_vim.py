"""Vim's whole mixer, projections and convolutions included, against the same weights in the published pipeline of flips."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import BiMamba
from ssmkit.ops import selective_scan

from . import Bench, Rival, official, register
from .layers import layer_inputs, loaded

# The projections add up to 2 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0
KEPT = ("A_log", "A_b_log", "D", "D_b")
# x, dt (batch, dim, seqlen), A, B, C (batch, dstate, seqlen), D, dt_bias -> y like x, with softplus on dt
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def vim_inputs(batch: int, seqlen: int, d_model: int, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Hidden states, and the parameters of a fresh layer under their names in its state dict."""
    shape = (batch, seqlen, d_model)
    return layer_inputs(lambda: made(BiMamba, d_model), "hidden_states", shape, KEPT, dtype, device)


def made(kind: type[BiMamba], d_model: int, **options: Any) -> BiMamba:
    """The layer of the released models."""
    return kind(d_model, bimamba_type="v2", if_divide_out=True, **options)


def one_direction(layer: Any, suffix: str, xz: Tensor, scan: Scan) -> Tensor:
    """The published arithmetic of one direction, gated, of inputs and gates (batch, 2 * dim, seqlen)."""
    conv, to_dt = getattr(layer, f"conv1d{suffix}"), getattr(layer, f"dt_proj{suffix}")
    x, z = xz.chunk(2, dim=1)
    x = F.silu(conv(x)[..., : x.shape[2]])
    sizes = layer.dt_rank, layer.d_state, layer.d_state
    dt, B, C = getattr(layer, f"x_proj{suffix}")(x.transpose(1, 2)).split(sizes, dim=2)
    dt = F.linear(dt, to_dt.weight).transpose(1, 2)
    A, D = -torch.exp(getattr(layer, f"A{suffix}_log").float()), getattr(layer, f"D{suffix}").float()
    return scan(x, dt, A, B.transpose(1, 2), C.transpose(1, 2), D, to_dt.bias.float()) * F.silu(z)


class Flips(BiMamba):
    """The published pipeline: channels before tokens, a flipped copy for the backward direction, its result flipped."""

    published: Scan

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """As `BiMamba.forward`."""
        xz = self.in_proj(hidden_states).transpose(1, 2).contiguous()
        y = one_direction(self, "", xz, self.published) + one_direction(self, "_b", xz.flip(2), self.published).flip(2)
        return self.out_proj(y.transpose(1, 2) / 2)


def flips(load: Callable[[], Scan], **options: Any) -> Rival:
    """The published pipeline over the scan that `load` gives."""

    def make(inputs: dict[str, Any]) -> BiMamba:
        layer = made(Flips, inputs["hidden_states"].shape[-1])
        assert isinstance(layer, Flips)
        layer.published = load()
        return layer

    return loaded(make, "hidden_states", **options)


def ssmkit_scan() -> Scan:
    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
        y = selective_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    return scan


def mamba_ssm_reference() -> Scan:
    reference = official.mamba_ssm("ops.selective_scan_interface").selective_scan_ref
    return lambda x, dt, A, B, C, D, dt_bias: reference(x, dt, A, B, C, D, None, dt_bias, True)


def mamba_ssm_cuda() -> Scan:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return lambda x, dt, A, B, C, D, dt_bias: scan(
        x, dt.contiguous(), A, B.contiguous(), C.contiguous(), D, None, dt_bias, True
    )


def mambapy_pscan() -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
        dt = F.softplus(dt + dt_bias)
        h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
        return ((h @ C[..., None]).squeeze(3) + D * x).transpose(1, 2)

    return scan


def reference(hidden_states: Tensor, **weights: Tensor) -> Tensor:
    """The layer in float64 on the reference ops."""
    layer = made(BiMamba, hidden_states.shape[-1], backend="reference").double()
    return functional_call(layer, weights, (hidden_states,))


def loop_declines(seqlen: int, mode: str) -> str | None:
    """Each step's indexing gets a gradient of full size."""
    if mode == "fwdbwd" and seqlen > 512:
        return f"its backward is quadratic in length; not run at {seqlen} tokens"
    return None


def sizes(d_model: int) -> tuple[int, int, int]:
    """Inner width, states per channel, rank of the step sizes."""
    return 2 * d_model, 16, -(-d_model // 16)


def products(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """The projections: in and out, and of each direction to steps and weights and from the rank of the steps."""
    d_inner, dstate, rank = sizes(d_model)
    return batch * seqlen * d_inner * (3 * d_model + 2 * (2 * rank + 2 * dstate)) * (1 if mode == "fwd" else 3)


def fmas(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """Of each direction the convolution and the scan (3 per state and token; 13 with backward)."""
    d_inner, dstate, _ = sizes(d_model)
    return 2 * batch * seqlen * d_inner * (4 + 3 * dstate if mode == "fwd" else 12 + 13 * dstate)


def exps(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    d_inner, dstate, _ = sizes(d_model)
    return 2 * batch * seqlen * d_inner * dstate * (1 if mode == "fwd" else 2)


def bytes_moved(batch: int, seqlen: int, d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    d_inner, dstate, rank = sizes(d_model)
    weights = d_inner * (3 * d_model + 2 * (2 * rank + 3 * dstate + 7))
    return dtype.itemsize * (weights + 2 * batch * seqlen * d_model) * (1 if mode == "fwd" else 3)


register(
    Bench(
        name="vim",
        op=loaded(lambda inputs: made(BiMamba, inputs["hidden_states"].shape[-1]), "hidden_states"),
        inputs=vim_inputs,
        shapes={
            "Vim-Ti, 224x224 images": {"batch": 4, "seqlen": 197, "d_model": 192},
            "Vim-S, stride 8": {"batch": 1, "seqlen": 730, "d_model": 384},
            "VideoMamba-Ti, 8 frames": {"batch": 1, "seqlen": 1569, "d_model": 192},
        },
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=fmas,
        products=products,
        slack=SLACK,
        parameters=(*KEPT, "dt_proj.bias", "dt_proj_b.bias"),
        reference=reference,
        rivals={
            "flips and selective_scan": flips(ssmkit_scan),
            "flips and mamba_ssm reference": flips(mamba_ssm_reference, declines=loop_declines),
            "flips and mambapy pscan": flips(mambapy_pscan),
            "flips and mamba_ssm CUDA": flips(mamba_ssm_cuda, device="cuda"),
        },
    )
)
