"""The whole VSSD mixer, projections and convolution included, against the same weights in the published pipeline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import VSSD

from . import Bench, Rival, register
from .bench_ssd_noncausal import torch_sum, vssd_layer
from .layers import layer_inputs, loaded

# The projections add up to 4 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0
KEPT = ("D",)


def vssd_inputs(
    batch: int, height: int, width: int, d_model: int, headdim: int, dstate: int, *, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Tokens of images, their sizes, and the parameters of a fresh layer under their names in its state dict."""
    shape = (batch, height * width, d_model)
    inputs = layer_inputs(lambda: VSSD(d_model, headdim=headdim, d_state=dstate), "u", shape, KEPT, dtype, device)
    return inputs | {"height": height, "width": width}


class Published(VSSD):
    """The published pipeline, written here: a contiguous copy before and after the convolution, weights repeated."""

    plain: Callable[..., Tensor]

    def forward(self, u: Tensor, H: int, W: int) -> Tensor:
        """As `VSSD.forward`, with one group."""
        z, xBC, dt = self.in_proj(u).split((self.d_inner, self.conv_dim, self.nheads), dim=-1)
        image = xBC.unflatten(1, (H, W)).permute(0, 3, 1, 2).contiguous()
        xBC = F.silu(self.conv2d(image)).permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        x, B, C = xBC.split((self.d_inner, self.d_state, self.d_state), dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        A = -torch.exp(self.A_log.float())
        B, C = B.unsqueeze(2), C.unsqueeze(2)
        y = self.plain(x=x, dt=dt, A=A, B=B, C=C, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out_proj(self.norm(y.flatten(2)) * z)


def options_of(inputs: dict[str, Any]) -> dict[str, int]:
    """The arguments of the layer that has these weights."""
    dim, dstate = (
        inputs["out_proj.weight"].shape[1],
        (inputs["conv2d.weight"].shape[0] - 2 * inputs["u"].shape[-1]) // 2,
    )
    return {"d_model": inputs["u"].shape[-1], "headdim": dim // len(inputs["A_log"]), "d_state": dstate}


def published(plain: Callable[..., Tensor]) -> Rival:
    """The published pipeline over one form of the duality."""

    def make(inputs: dict[str, Any]) -> Published:
        layer = Published(**options_of(inputs))
        layer.plain = plain
        return layer

    return loaded(make, "u", ("height", "width"))


def reference(u: Tensor, height: int, width: int, **weights: Tensor) -> Tensor:
    """Our layer in float64 on the reference op."""
    layer = VSSD(**options_of({"u": u, **weights}), backend="reference").double()
    return functional_call(layer, weights, (u, height, width))


def products(batch: int, height: int, width: int, d_model: int, headdim: int, dstate: int, mode: str) -> float:
    """The projections, and the two products of the duality."""
    dim = 2 * d_model
    per_token = d_model * (3 * dim + 2 * dstate + dim // headdim) + 2 * dim * dstate
    return batch * height * width * per_token * (1 if mode == "fwd" else 3)


def fmas(batch: int, height: int, width: int, d_model: int, dstate: int, mode: str) -> float:
    """The convolution."""
    return batch * height * width * 9 * (2 * d_model + 2 * dstate) * (1 if mode == "fwd" else 3)


def bytes_moved(batch: int, height: int, width: int, d_model: int, dstate: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    weights = d_model * (6 * d_model + 2 * dstate) + 9 * (2 * d_model + 2 * dstate)
    return dtype.itemsize * (weights + 2 * batch * height * width * d_model) * (1 if mode == "fwd" else 3)


def stage(side: int, d_model: int, batch: int = 1) -> dict[str, int]:
    return {"batch": batch, "height": side, "width": side, "d_model": d_model, "headdim": 64, "dstate": 64}


register(
    Bench(
        name="vssd",
        op=loaded(lambda inputs: VSSD(**options_of(inputs)), "u", ("height", "width")),
        inputs=vssd_inputs,
        shapes={
            "VSSD-Tiny, first stage": stage(56, 64),
            "VSSD-Tiny, third stage, 8 images": stage(14, 256, 8),
        },
        bytes_moved=bytes_moved,
        fmas=fmas,
        products=products,
        slack=SLACK,
        parameters=tuple(name for name, _ in VSSD(1, headdim=1).named_parameters()),
        reference=reference,
        rivals={
            "published pipeline": published(vssd_layer),
            "published pipeline, torch products": published(torch_sum),
        },
    )
)
