"""The whole SS2D layer, projections and convolution included, against the same weights in the published pipeline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import SS2D
from ssmkit.nn.ss2d import NPATHS
from ssmkit.paths import cross

from . import Bench, Prepared, Rival, register
from .bench_cross_selective_scan import (
    Scan,
    gathered_reference,
    loop_declines,
    mamba_ssm_reference,
    mambapy_pscan,
    ssmkit_scan,
)

# The projections add up to 2 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0
KEPT = ("A_logs", "Ds")  # in fp32 whatever the dtype


def options_of(weights: dict[str, Tensor], d_model: int) -> dict[str, Any]:
    """The arguments of the layer that has these weights."""
    inner, gated = weights["out_proj.weight"].shape[1], "conv2d.bias" in weights
    return {
        "d_model": d_model,
        "d_state": weights["A_logs"].shape[1],
        "ssm_ratio": inner / d_model,
        "conv_bias": gated,
        "forward_type": "v0" if gated else "v05_noz",
    }


def ss2d_inputs(
    batch: int, height: int, width: int, d_model: int, dim: int, dstate: int, *, gated: bool = False,
    dtype: torch.dtype, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Images, and the parameters of a fresh layer of inner width `dim` under their names in its state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = "v0" if gated else "v05_noz"
        layer = SS2D(d_model, dstate, dim / d_model, conv_bias=gated, forward_type=kind)
        x = torch.randn(batch, height, width, d_model)
    weights = {name: t if name in KEPT else t.to(dtype) for name, t in layer.state_dict().items()}
    return {"x": x.to(device, dtype), **{name: t.to(device) for name, t in weights.items()}}


class Reference(SS2D):
    """The layer over the float64 reference, a chunk of tokens at a time."""

    def scan(self, x: Tensor) -> Tensor:
        """As `SS2D.scan`."""
        inputs = self.scan_inputs(x)
        inputs["dt"] = torch.einsum("blkr,kdr->blkd", inputs["dt"], inputs.pop("dt_weight"))
        return gathered_reference(cross(*x.shape[1:3]), **inputs).view_as(x)


class FourCopies(SS2D):
    """The published pipeline: the image copied into the order of each path, everything else made of the copies."""

    published: Scan

    def scan(self, x: Tensor) -> Tensor:
        """As `SS2D.scan`."""
        batch, height, width, dim = x.shape
        rank, dstate, length = self.dt_rank, self.d_state, height * width
        image = x.movedim(3, 1)
        xs = torch.stack([image.flatten(2), image.mT.flatten(2)], dim=1)
        xs = torch.cat([xs, xs.flip(3)], dim=1).flatten(1, 2)  # (batch, 4 * dim, length)
        projected = F.conv1d(xs, self.x_proj_weight.flatten(0, 1).unsqueeze(2), groups=NPATHS)
        dt, B, C = projected.unflatten(1, (NPATHS, -1)).split((rank, dstate, dstate), dim=2)
        dt = F.conv1d(dt.flatten(1, 2), self.dt_projs_weight.flatten(0, 1).unsqueeze(2), groups=NPATHS)
        A = -torch.exp(self.A_logs.float())
        ys = self.published(xs, dt, A, B, C, self.Ds, self.dt_projs_bias.flatten(), True)
        ys = ys.unflatten(1, (NPATHS, dim))
        ys = ys[:, :2] + ys[:, 2:].flip(3)
        y = ys[:, 0] + ys[:, 1].view(batch, dim, width, height).mT.reshape(batch, dim, length)
        return y.transpose(1, 2).reshape(batch, height, width, dim)


def loaded(kind: type[SS2D], load: Callable[[], Scan] | None = None, **options: Any) -> Rival:
    """A layer of this kind, over the scan that `load` gives, holding the inputs' weights; its parameters are the leaves."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        weights = {name: t for name, t in inputs.items() if name != "x"}
        x = inputs["x"]
        layer = kind(**options_of(weights, x.shape[-1]), device=x.device)
        if isinstance(layer, FourCopies) and load is not None:
            layer.published = load()
        for name, parameter in layer.named_parameters():
            parameter.data = weights[name].detach().clone()
            parameter.requires_grad_(weights[name].requires_grad)
        return Prepared(lambda: layer(x), leaves={"x": x, **dict(layer.named_parameters())})

    return Rival(prepare=prepare, **options)


def reference(x: Tensor, **weights: Tensor) -> Tensor:
    """The layer in float64."""
    layer = Reference(**options_of(weights, x.shape[-1])).double()
    return functional_call(layer, weights, (x,))


def products(batch: int, height: int, width: int, d_model: int, dim: int, dstate: int, gated: bool, mode: str) -> float:
    """The projections: in, out, to steps and weights of each path, from the rank of the steps."""
    rank = -(-d_model // 16)
    per_token = dim * ((3 if gated else 2) * d_model + NPATHS * (2 * rank + 2 * dstate))
    return batch * height * width * per_token * (1 if mode == "fwd" else 3)


def fmas(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    """The convolution and the scans (3 per path, state and token; 13 with backward)."""
    return batch * height * width * dim * (9 + 3 * NPATHS * dstate if mode == "fwd" else 27 + 13 * NPATHS * dstate)


def exps(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    return NPATHS * batch * height * width * dim * dstate * (1 if mode == "fwd" else 2)


def bytes_moved(
    batch: int, height: int, width: int, d_model: int, dim: int, dstate: int, gated: bool, dtype: torch.dtype, mode: str
) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    rank = -(-d_model // 16)
    weights = dim * ((3 if gated else 2) * d_model + 9 + NPATHS * (2 * rank + 3 * dstate + 2))
    return dtype.itemsize * (weights + 2 * batch * height * width * d_model) * (1 if mode == "fwd" else 3)


def first_stage(dim: int, dstate: int, gated: bool = False) -> dict[str, Any]:
    """Of an image of 224 x 224."""
    return {"batch": 1, "height": 56, "width": 56, "d_model": 96, "dim": dim, "dstate": dstate, "gated": gated}


register(
    Bench(
        name="ss2d",
        op=loaded(SS2D),
        inputs=ss2d_inputs,
        shapes={
            "VMamba-T (s1l8), 96 channels, 1 state": first_stage(96, 1),
            "96 channels, 16 states": first_stage(96, 16),
            "VMamba-T (s2l5), 192 channels, 1 state": first_stage(192, 1),
            "first VMamba-T, gated, 192 channels, 16 states": first_stage(192, 16, gated=True),
        },
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=fmas,
        products=products,
        slack=SLACK,
        parameters=("A_logs", "Ds", "dt_projs_bias", "dt_projs_weight", "x_proj_weight"),
        reference=reference,
        rivals={
            "four copies and selective_scan": loaded(FourCopies, ssmkit_scan),
            "four copies and mamba_ssm reference": loaded(FourCopies, mamba_ssm_reference, declines=loop_declines),
            "four copies and mambapy pscan": loaded(FourCopies, mambapy_pscan),
        },
    )
)
