"""Whole layers as candidates: inputs that hold the weights of a fresh layer, and layers that hold those of the inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Prepared, Rival


def layer_inputs(
    make: Callable[[], nn.Module], name: str, shape: Sequence[int], kept: Sequence[str], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """The layer's input under its name, and the parameters of a fresh layer, those in `kept` in fp32 whatever the dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = make().state_dict()
        x = torch.randn(*shape)
    weights = {key: t if key in kept else t.to(dtype) for key, t in weights.items()}
    return {name: x.to(device, dtype), **{key: t.to(device) for key, t in weights.items()}}


def loaded(make: Callable[[dict[str, Any]], nn.Module], name: str, args: tuple[str, ...] = (), **options: Any) -> Rival:
    """The layer that `make` gives for the inputs, holding their weights; its parameters are the leaves.

    It is called with the input `name` and with `args`, sizes among the inputs.
    """

    def prepare(inputs: dict[str, Any]) -> Prepared:
        x, sizes = inputs[name], [inputs[arg] for arg in args]
        layer = make(inputs).to(x.device)
        for key, parameter in layer.named_parameters():
            parameter.data = inputs[key].detach().clone()
            parameter.requires_grad_(inputs[key].requires_grad)
        return Prepared(lambda: layer(x, *sizes), leaves={name: x, **dict(layer.named_parameters())})

    return Rival(prepare=prepare, **options)
