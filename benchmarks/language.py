"""Whole language models by name, ours and transformers', on the same weights: for bench_prefill.py and bench_decode.py."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ssmkit.models.language import LanguageModel, language_model_config

from .registry import Prepared, Rival

MODELS = {"mamba-130m": "Mamba-130M", "mamba2-130m": "Mamba2-130M"}
# 24 layers of products of up to 1536 terms, each rounded in fp32, in a residual stream.
SLACK = 4.0


def model_inputs(model: str, batch: int, seqlen: int = 1, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A name of `ssmkit.models.language`, token ids, and a fresh model's parameters under the official names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LanguageModel(language_model_config(model), dtype=dtype)
        input_ids = torch.randint(made.config.vocab_size, (batch, seqlen))
    return {
        "model": model,
        "input_ids": input_ids.to(device),
        **{k: t.to(device) for k, t in made.state_dict().items()},
    }


def ours(model: str, weights: dict[str, Tensor], **overrides: Any) -> LanguageModel:
    """The model on these very tensors, for inference."""
    made = LanguageModel(language_model_config(model, **overrides), device="meta")
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    return made.requires_grad_(False).eval()


def transformers_model(model: str, weights: dict[str, Tensor]) -> torch.nn.Module:
    """MambaForCausalLM or Mamba2ForCausalLM on these very tensors."""
    values = language_model_config(model).to_transformers()
    package = importlib.import_module("transformers")
    kind = getattr(package, values["architectures"][0])
    with torch.device("meta"):
        made = kind(kind.config_class(**values))
    renamed = {name.replace("embedding.", "embeddings."): t for name, t in weights.items()}
    made.load_state_dict(renamed, assign=True)
    return made.eval()


def on_weights(prepare: Callable[[Any, Tensor], Prepared], make: Callable[..., Any], **options: Any) -> Rival:
    """A candidate that needs a model, made once from the inputs, and the tokens."""

    def prepared(inputs: dict[str, Any]) -> Prepared:
        weights = {name: t for name, t in inputs.items() if name not in ("model", "input_ids")}
        return prepare(make(inputs["model"], weights), inputs["input_ids"])

    return Rival(prepare=prepared, **options)


def reference(model: str, input_ids: Tensor, **weights: Tensor) -> Tensor:
    """Logits of the last token, in float64 on the reference ops."""
    return ours(model, weights, backend="reference")(input_ids, num_last_tokens=1).squeeze(1)


@cache
def matrices(model: str) -> int:
    """Weights of the matrix products that every token passes; the head is counted apart."""
    with torch.device("meta"):
        made = LanguageModel(language_model_config(model))
    return sum(p.numel() for name, p in made.backbone.layers.named_parameters() if name.endswith("proj.weight"))


@cache
def head(model: str) -> int:
    """Weights of the head, which only the last token passes."""
    config = language_model_config(model)
    return config.padded_vocab_size * config.d_model
