"""The whole DBM mixer, projections and convolution included, against the same weights in the published pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import DBM

from . import Bench, Rival, register
from .bench_vim import SLACK, Scan, loop_declines, mamba_ssm_reference, mambapy_pscan, one_direction, ssmkit_scan
from .layers import layer_inputs, loaded

KEPT = ("A_log", "D")
STATES = 16


def dbm_inputs(batch: int, seqlen: int, d_model: int, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Hidden states, and the parameters of a fresh layer under their names in its state dict."""
    shape = (batch, seqlen, d_model)
    return layer_inputs(lambda: DBM(d_model, expand=1), "hidden_states", shape, KEPT, dtype, device)


class Flips(DBM):
    """The published pipeline: the backward half flipped, both halves on the batch axis, the result flipped back."""

    published: Scan

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """As `DBM.forward`."""
        forwards, backwards = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        y = one_direction(self, "", torch.cat((forwards, backwards.flip(2))), self.published)
        y_f, y_b = y.chunk(2)
        return self.out_proj(torch.cat((y_f, y_b.flip(2)), dim=1).transpose(1, 2))


def flips(load: Callable[[], Scan], **options: Any) -> Rival:
    """The published pipeline over the scan that `load` gives."""

    def make(inputs: dict[str, Any]) -> DBM:
        layer = Flips(inputs["hidden_states"].shape[-1], expand=1)
        layer.published = load()
        return layer

    return loaded(make, "hidden_states", **options)


def reference(hidden_states: Tensor, **weights: Tensor) -> Tensor:
    """The layer in float64 on the reference ops."""
    layer = DBM(hidden_states.shape[-1], expand=1, backend="reference").double()
    return functional_call(layer, weights, (hidden_states,))


def products(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """The projections: in and out, and of both halves to steps and weights and from the rank of the steps."""
    rank = -(-d_model // 16)
    return batch * seqlen * d_model * (6 * d_model + 2 * (2 * rank + 2 * STATES)) * (1 if mode == "fwd" else 3)


def fmas(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """Of each half the convolution and the scan (3 per state and token; 13 with backward)."""
    return 2 * batch * seqlen * d_model * (4 + 3 * STATES if mode == "fwd" else 12 + 13 * STATES)


def exps(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    return 2 * batch * seqlen * d_model * STATES * (1 if mode == "fwd" else 2)


def bytes_moved(batch: int, seqlen: int, d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    rank = -(-d_model // 16)
    weights = d_model * (6 * d_model + 2 * rank + 3 * STATES + 7)
    return dtype.itemsize * (weights + 2 * batch * seqlen * d_model) * (1 if mode == "fwd" else 3)


register(
    Bench(
        name="dbm",
        op=loaded(lambda inputs: DBM(inputs["hidden_states"].shape[-1], expand=1), "hidden_states"),
        inputs=dbm_inputs,
        shapes={
            "ActionMamba, 2304 moments": {"batch": 2, "seqlen": 2304, "d_model": 512},
            "ActionMamba, 144 moments": {"batch": 2, "seqlen": 144, "d_model": 512},
        },
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=fmas,
        products=products,
        slack=SLACK,
        parameters=(*KEPT, "dt_proj.bias"),
        reference=reference,
        rivals={
            "flips and selective_scan": flips(ssmkit_scan),
            "flips and mamba_ssm reference": flips(mamba_ssm_reference, declines=loop_declines),
            "flips and mambapy pscan": flips(mambapy_pscan),
        },
    )
)
