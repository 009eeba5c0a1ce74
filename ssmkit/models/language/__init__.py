"""Language models by name, and their weights."""

from dataclasses import fields
from typing import Any

import torch

from ssmkit.models.language.config import LanguageModelConfig
from ssmkit.models.language.model import LanguageModel
from ssmkit.models.language.sampling import Sampling
from ssmkit.models.language.weights import load, save

_MAMBA = {"layer": "mamba1", "vocab_size": 50277, "pad_vocab_size_multiple": 8}
_MAMBA2 = {"layer": "mamba2", "vocab_size": 50277, "pad_vocab_size_multiple": 16}
# Sizes of the published checkpoints (all with the tokenizer of GPT-NeoX), and four models of bytes.
VARIANTS: dict[str, dict[str, Any]] = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, **_MAMBA},
    "mamba-370m": {"d_model": 1024, "n_layer": 48, **_MAMBA},
    "mamba-790m": {"d_model": 1536, "n_layer": 48, **_MAMBA},
    "mamba-1.4b": {"d_model": 2048, "n_layer": 48, **_MAMBA},
    "mamba-2.8b": {"d_model": 2560, "n_layer": 64, **_MAMBA},
    "mamba2-130m": {"d_model": 768, "n_layer": 24, **_MAMBA2},
    "mamba2-370m": {"d_model": 1024, "n_layer": 48, **_MAMBA2},
    "mamba2-780m": {"d_model": 1536, "n_layer": 48, **_MAMBA2},
    "mamba2-1.3b": {"d_model": 2048, "n_layer": 48, **_MAMBA2},
    "mamba2-2.7b": {"d_model": 2560, "n_layer": 64, **_MAMBA2},
    "mamba2attn-2.7b": {
        "d_model": 2560,
        "n_layer": 64,
        **_MAMBA2,
        "attn_layer_idx": (9, 18, 27, 36, 45, 56),
        "num_heads": 30,
        "head_dim": 128,
        "attn_d_conv": 4,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "rotary_emb_dim": 64,
    },
    "byte-small": {"d_model": 128, "n_layer": 4, "vocab_size": 256, "layer": "mamba1"},
    "byte-mamba2": {"d_model": 256, "n_layer": 6, "vocab_size": 256, "layer": "mamba2", "d_state": 64, "headdim": 32},
    "byte-mamba3": {"d_model": 256, "n_layer": 6, "vocab_size": 256, "layer": "mamba3", "d_state": 64, "headdim": 32},
    "byte-hybrid": {
        "d_model": 256,
        "n_layer": 6,
        "vocab_size": 256,
        "layer": "mamba2",
        "d_state": 64,
        "headdim": 32,
        "attn_layer_idx": (3,),
        "num_heads": 4,
        "head_dim": 64,
        "rotary_emb_dim": 32,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    },
}


def language_model_config(name: str, **overrides: Any) -> LanguageModelConfig:
    """The config of a named variant, with some fields changed."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}, known: {', '.join(VARIANTS)}")
    known = {entry.name for entry in fields(LanguageModelConfig)}
    unknown = set(overrides) - known
    if unknown:
        raise ValueError(
            f"language models have no option {', '.join(sorted(unknown))}; they have {', '.join(sorted(known))}"
        )
    return LanguageModelConfig(**{**VARIANTS[name], **overrides})


def language_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> LanguageModel:
    """A model of a named variant with fresh weights, e.g. language_model("mamba2-130m", n_layer=12).

    Args:
        name: A row of VARIANTS.
        device, dtype: Of the parameters.
        overrides: Fields of `LanguageModelConfig`.
    """
    return LanguageModel(language_model_config(name, **overrides), device=device, dtype=dtype)


__all__ = [
    "VARIANTS",
    "LanguageModel",
    "LanguageModelConfig",
    "Sampling",
    "language_model",
    "language_model_config",
    "load",
    "save",
]
