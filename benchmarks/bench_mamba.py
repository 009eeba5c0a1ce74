"""The whole Mamba layer, projections and convolution included, against other layers with the same weights."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssmkit.nn import Mamba

from . import Bench, Prepared, Rival, register

# The projections add up to 2 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0


def mamba_inputs(batch: int, seqlen: int, d_model: int, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Hidden states, and the parameters of a fresh layer under their names in its state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = Mamba(d_model).state_dict()
        hidden_states = torch.randn(batch, seqlen, d_model)
    kept = {name: t if name in ("A_log", "D") else t.to(dtype) for name, t in weights.items()}
    return {"hidden_states": hidden_states.to(device, dtype), **{name: t.to(device) for name, t in kept.items()}}


def loaded(
    make: Callable[[int], nn.Module], call: Callable[[nn.Module, Tensor], Any] | None = None, **options: Any
) -> Rival:
    """A layer made for a width, holding the inputs' weights; its parameters are the leaves."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        weights = {name: t for name, t in inputs.items() if name != "hidden_states"}
        x = inputs["hidden_states"]
        layer = make(x.shape[-1]).to(x.device)
        for name, parameter in layer.named_parameters():
            parameter.data = weights[name].detach().clone()
            parameter.requires_grad_(weights[name].requires_grad)
        leaves = {"hidden_states": x, **dict(layer.named_parameters())}
        return Prepared((lambda: call(layer, x)) if call else (lambda: layer(x)), leaves=leaves)

    return Rival(prepare=prepare, **options)


def reference(hidden_states: Tensor, **weights: Tensor) -> Tensor:
    """Our layer in float64 on the reference ops."""
    layer = Mamba(hidden_states.shape[-1], backend="reference").double()
    return functional_call(layer, weights, (hidden_states,))


def transformers_mixer(**options: bool) -> Callable[[int], nn.Module]:
    def make(d_model: int) -> nn.Module:
        package = importlib.import_module("transformers.models.mamba")
        config = package.MambaConfig(hidden_size=d_model, num_hidden_layers=1, **options)
        return importlib.import_module("transformers.models.mamba.modeling_mamba").MambaMixer(config, 0)

    return make


def mambapy_block(d_model: int) -> nn.Module:
    module = importlib.import_module("mambapy.mamba")
    return module.MambaBlock(module.MambaConfig(d_model=d_model, n_layers=1))


def mamba_ssm_layer(d_model: int) -> nn.Module:
    return importlib.import_module("mamba_ssm").Mamba(d_model)


def loop_declines(seqlen: int, mode: str) -> str | None:
    if mode == "fwdbwd" and seqlen > 512:
        return f"its backward is quadratic in length; not run at {seqlen} tokens"
    return None


def sizes(d_model: int) -> tuple[int, int, int]:
    """Inner width, states per channel, rank of the step sizes."""
    return 2 * d_model, 16, -(-d_model // 16)


def products(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """The four projections."""
    d_inner, dstate, rank = sizes(d_model)
    return batch * seqlen * d_inner * (3 * d_model + 2 * rank + 2 * dstate) * (1 if mode == "fwd" else 3)


def fmas(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    """The convolution and the scan (3 per state and token; 13 with backward)."""
    d_inner, dstate, _ = sizes(d_model)
    return batch * seqlen * d_inner * (4 + 3 * dstate if mode == "fwd" else 12 + 13 * dstate)


def exps(batch: int, seqlen: int, d_model: int, mode: str) -> float:
    d_inner, dstate, _ = sizes(d_model)
    return batch * seqlen * d_inner * dstate * (1 if mode == "fwd" else 2)


def bytes_moved(batch: int, seqlen: int, d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    d_inner, dstate, rank = sizes(d_model)
    weights = d_inner * (3 * d_model + 2 * rank + 3 * dstate)
    tokens = 2 * batch * seqlen * d_model
    return dtype.itemsize * (weights + tokens) * (1 if mode == "fwd" else 3)


register(
    Bench(
        name="mamba",
        op=loaded(Mamba),
        inputs=mamba_inputs,
        shapes={
            "Mamba-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "d_model": 768},
            "Mamba-130M, 4096 tokens": {"batch": 1, "seqlen": 4096, "d_model": 768},
            "Decision Mamba, 20 steps of 3 tokens": {"batch": 64, "seqlen": 60, "d_model": 128},
        },
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=fmas,
        products=products,
        slack=SLACK,
        reference=reference,
        rivals={
            "transformers MambaMixer": loaded(transformers_mixer(), declines=loop_declines),
            "transformers MambaMixer (mambapy path)": loaded(transformers_mixer(use_mambapy=True)),
            "mambapy MambaBlock": loaded(mambapy_block),
            "mamba_ssm Mamba": loaded(mamba_ssm_layer, device="cuda"),
        },
    )
)
