"""One Mamba-ND layer along an order of an image or a clip, against the same weights over tokens that are moved around."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssmkit.nn import MambaNDLayer
from ssmkit.nn.mamba_nd import alternating_paths
from ssmkit.paths import ScanPath

from . import Bench, Rival, bench_mamba, register
from .layers import layer_inputs, loaded

KEPT = ("mixer.A_log", "mixer.D")


class Along(MambaNDLayer):
    """The layer, always along the same path."""

    path: ScanPath

    def forward(self, hidden: Tensor, path: ScanPath | None = None) -> Tensor:
        """As `MambaNDLayer.forward`."""
        return super().forward(hidden, self.path)


class Moved(Along):
    """The published pipeline, whose permutation and flip are one gather here, and their undoing another."""

    def forward(self, hidden: Tensor, path: ScanPath | None = None) -> Tensor:
        """As `MambaNDLayer.forward`."""
        return MambaNDLayer.forward(self, hidden[:, self.path.tokens()])[:, self.path.inverse()]


def made(kind: type[Along], grid: tuple[int, ...], turn: int, d_model: int, **options: Any) -> Along:
    """The layer for tokens in a grid, whose order is the number `turn` of those that layers take in turn."""
    layer = kind(d_model, **options)
    layer.path = alternating_paths(grid)[turn]
    return layer


def mamba_nd_inputs(
    batch: int, grid: tuple[int, ...], turn: int, d_model: int, *, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Tokens, and the parameters of a fresh layer under their names in its state dict."""
    shape = (batch, torch.Size(grid).numel(), d_model)
    tensors = layer_inputs(lambda: MambaNDLayer(d_model), "hidden", shape, KEPT, dtype, device)
    return {**tensors, "grid": grid, "turn": turn}


def candidate(kind: type[Along]) -> Rival:
    """A layer of this kind with the weights of the inputs."""

    def make(inputs: dict[str, Any]) -> nn.Module:
        return made(kind, inputs["grid"], inputs["turn"], inputs["hidden"].shape[-1])

    return loaded(make, "hidden")


def reference(hidden: Tensor, grid: tuple[int, ...], turn: int, **weights: Tensor) -> Tensor:
    """The layer in float64 on the reference ops."""
    layer = made(Along, grid, turn, hidden.shape[-1], backend="reference").double()
    return functional_call(layer, weights, (hidden,))


def of_mamba(count: Any) -> Any:
    """What a plain Mamba layer over as many tokens costs."""

    def counted(batch: int, grid: tuple[int, ...], d_model: int, mode: str) -> float:
        return count(batch, torch.Size(grid).numel(), d_model, mode)

    return counted


def bytes_moved(batch: int, grid: tuple[int, ...], d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    return bench_mamba.bytes_moved(batch, torch.Size(grid).numel(), d_model, dtype, mode)


register(
    Bench(
        name="mamba_nd",
        op=candidate(Along),
        inputs=mamba_nd_inputs,
        shapes={
            "Mamba-2D-S, 28x28, columns backwards": {"batch": 1, "grid": (28, 28), "turn": 3, "d_model": 384},
            "Mamba-3D-S, 16x14x14, places backwards": {"batch": 1, "grid": (16, 14, 14), "turn": 5, "d_model": 384},
        },
        bytes_moved=bytes_moved,
        exps=of_mamba(bench_mamba.exps),
        fmas=of_mamba(bench_mamba.fmas),
        products=of_mamba(bench_mamba.products),
        slack=bench_mamba.SLACK,
        parameters=(*KEPT, "mixer.dt_proj.bias", "norm.weight", "norm.bias"),
        reference=reference,
        rivals={"gather, Mamba, scatter": candidate(Moved)},
    )
)
