"""One token through a Mamba-130M language model: bound by its weights, which stream from memory at every token."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.nn import MambaStack

from . import Bench, Prepared, Rival, register

VOCABULARY = 50280
# 24 layers of products of up to 1536 terms, each rounded in fp32, in a residual stream.
SLACK = 4.0


def step_inputs(batch: int, d_model: int, n_layer: int, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Token ids, and a fresh model's weights under the names of MambaForCausalLM, whose head and embedding are tied."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {f"backbone.{name}": t for name, t in MambaStack(d_model, n_layer).state_dict().items()}
        weights["backbone.embeddings.weight"] = 0.02 * torch.randn(VOCABULARY, d_model)
        tokens = torch.randint(VOCABULARY, (batch, 1))
    wide = ("A_log", "D")
    kept = {name: t if name.rpartition(".")[2] in wide else t.to(dtype) for name, t in weights.items()}
    return {"tokens": tokens.to(device), **{name: t.to(device) for name, t in kept.items()}}


def depth_of(inputs: dict[str, Any]) -> int:
    """Number of layers."""
    return 1 + max(int(name.split(".")[2]) for name in inputs if name.startswith("backbone.layers."))


def stack_of(inputs: dict[str, Any], **options: Any) -> MambaStack:
    """Our layers with these weights, which are shared, not copied."""
    weights = {name.removeprefix("backbone."): t for name, t in inputs.items() if name.startswith("backbone.")}
    width = weights.pop("embeddings.weight").shape[1]
    with torch.device("meta"):
        stack = MambaStack(width, depth_of(inputs), **options)
    stack.load_state_dict(weights, assign=True)
    return stack.requires_grad_(False)


def ours(inputs: dict[str, Any]) -> Prepared:
    """Embedding, `step` of every layer with the state updated in place, head."""
    stack, embedding, tokens = stack_of(inputs), inputs["backbone.embeddings.weight"], inputs["tokens"]
    state = stack.allocate_inference_cache(tokens.shape[0])
    return Prepared(lambda: F.linear(stack.step(F.embedding(tokens, embedding), state), embedding))


def reference(**inputs: Any) -> Tensor:
    """The same first token without a cache, in float64 on the reference ops."""
    embedding = inputs["backbone.embeddings.weight"]
    return F.linear(stack_of(inputs, backend="reference")(F.embedding(inputs["tokens"], embedding)), embedding)


def transformers_step(inputs: dict[str, Any]) -> Prepared:
    """MambaForCausalLM with its cache, as `generate` calls it; the first call, which is checked, fills the cache."""
    package = importlib.import_module("transformers.models.mamba")
    width, depth = inputs["backbone.embeddings.weight"].shape[1], depth_of(inputs)
    config = package.MambaConfig(hidden_size=width, num_hidden_layers=depth, vocab_size=VOCABULARY)
    with torch.device("meta"):
        model = package.MambaForCausalLM(config)
    weights = {name: t for name, t in inputs.items() if name != "tokens"}
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    model.load_state_dict(weights, assign=True)
    model.eval()
    cache = None

    def call() -> Tensor:
        nonlocal cache
        out = model(inputs["tokens"], cache_params=cache, use_cache=True)
        cache = out.cache_params
        return out.logits

    return Prepared(call)


def sizes_of_weights(d_model: int, n_layer: int) -> Iterator[int]:
    d_inner, dstate, rank = 2 * d_model, 16, -(-d_model // 16)
    yield VOCABULARY * d_model
    yield n_layer * d_inner * (3 * d_model + 2 * rank + 3 * dstate + 7)


def bytes_read(d_model: int, n_layer: int, dtype: torch.dtype) -> float:
    """The weights."""
    return dtype.itemsize * sum(sizes_of_weights(d_model, n_layer))


def bytes_moved(batch: int, d_model: int, n_layer: int) -> float:
    """The states, read and written, in fp32."""
    return 4 * 2 * batch * n_layer * 2 * d_model * (16 + 3)


register(
    Bench(
        name="mamba_step",
        op=Rival(prepare=ours),
        inputs=step_inputs,
        modes=("fwd",),
        shapes={
            "Mamba-130M, one token": {"batch": 1, "d_model": 768, "n_layer": 24},
            "Mamba-130M, one token for 8 sequences": {"batch": 8, "d_model": 768, "n_layer": 24},
        },
        bytes_read=bytes_read,
        bytes_moved=bytes_moved,
        fmas=lambda batch, d_model, n_layer: batch * sum(sizes_of_weights(d_model, n_layer)),
        slack=SLACK,
        reference=reference,
        rivals={"transformers MambaForCausalLM": Rival(prepare=transformers_step)},
    )
)
