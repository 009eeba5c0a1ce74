"""The official config of a language model."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ssmkit.models.language import LanguageModelConfig


@dataclass
class MambaConfig:
    """Fields and defaults of the official class; `ssm_cfg["layer"]` is "Mamba1" (the default), "Mamba2" or "Mamba3"."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def to_language_model(self, **overrides: Any) -> LanguageModelConfig:
        """The same as ssmkit says it; an entry that its models do not have is refused by name."""
        return LanguageModelConfig.from_official(asdict(self), **overrides)
