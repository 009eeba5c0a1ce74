"""MambaLMHeadModel: `ssmkit.models.language` with the official signatures and parameter names."""

import json
from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmkit.nn
from ssmkit.interop.mamba_ssm.models.config_mamba import MambaConfig
from ssmkit.interop.mamba_ssm.modules.block import Block
from ssmkit.interop.mamba_ssm.modules.mamba2 import Mamba2
from ssmkit.interop.mamba_ssm.modules.mamba3 import Mamba3
from ssmkit.interop.mamba_ssm.modules.mamba_simple import Mamba
from ssmkit.interop.mamba_ssm.modules.mha import MHA
from ssmkit.interop.mamba_ssm.modules.mlp import GatedMLP
from ssmkit.interop.mamba_ssm.ops.triton.layer_norm import RMSNorm
from ssmkit.interop.mamba_ssm.utils.generation import GenerationMixin
from ssmkit.interop.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from ssmkit.models.language.model import Backbone, initialise
from ssmkit.models.language.weights import EMBEDDING, HEAD

MIXERS: dict[str, Any] = {"mamba1": Mamba, "mamba2": Mamba2, "mamba3": Mamba3}
# Layers that a language model is made of, and the same layers with the official argument names.
OFFICIAL: dict[type, Any] = {ssmkit.nn.Mamba2: Mamba2, ssmkit.nn.Mamba3: Mamba3, ssmkit.nn.MHA: MHA}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One residual block: Mamba of the kind that ssm_cfg["layer"] names, or attention where attn_layer_idx says so."""
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    options = dict(ssm_cfg or {})
    layer = str(options.pop("layer", "Mamba1"))
    if layer.lower() not in MIXERS:
        raise ValueError(f"ssm_cfg['layer'] must be Mamba1, Mamba2 or Mamba3, got {layer!r}")
    kind: Any = MIXERS[layer.lower()]
    if layer_idx in (attn_layer_idx or ()):
        kind, options = MHA, attn_cfg or {}
    block = Block(
        d_model,
        partial(kind, layer_idx=layer_idx, **options, **place),
        partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **place)
        if d_intermediate
        else nn.Identity,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **place),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


class MixerModel(Backbone):
    """Embedding, blocks, final norm: `ssmkit.models.language.model.Backbone`, called with tokens.

    Args:
        d_model ... residual_in_fp32: As in the official class; vocab_size is not rounded up.
        fused_add_norm: Accepted for compatibility: add and norm are one kernel where the norm is RMSNorm.
        initializer_cfg: Accepted for compatibility; weights are drawn by `MambaLMHeadModel`.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = MambaConfig(
            d_model, d_intermediate, n_layer, vocab_size, ssm_cfg or {}, attn_layer_idx or [], attn_cfg or {},
            rms_norm, residual_in_fp32, fused_add_norm, 1,
        )  # fmt: skip
        super().__init__(config.to_language_model(norm_eps=norm_epsilon), device=device, dtype=dtype)
        for layer in self.layers:
            # no member differs, only what its methods call their arguments
            layer.mixer.__class__ = OFFICIAL.get(type(layer.mixer), type(layer.mixer))
            # norm_epsilon is that of the blocks' norms; the official mixer keeps its own.
            if isinstance(layer.mixer, Mamba2) and layer.mixer.norm is not None:
                layer.mixer.norm.eps = 1e-5

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:  # type: ignore[override]
        """Hidden states (batch, seqlen, d_model) of tokens (batch, seqlen); mixer_kwargs go to every mixer."""
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        return super().forward(self.embedding(input_ids), **mixer_kwargs)

    def allocate_inference_cache(  # type: ignore[override]
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> dict[int, Any]:
        """States before any token, by layer, as `InferenceParams.key_value_memory_dict` holds them."""
        return dict(enumerate(super().allocate_inference_cache(batch_size, max_seqlen, dtype)))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model with the official arguments; weights start as there.

    Args:
        config: Sizes and choices.
        initializer_cfg: Other initialisations are not offered; None or empty.
        device, dtype: Of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if initializer_cfg:
            raise ValueError(f"initializer_cfg must be None, got {initializer_cfg}; draw the weights anew afterwards")
        language = config.to_language_model()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            language.padded_vocab_size,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            residual_in_fp32=config.residual_in_fp32,
            fused_add_norm=config.fused_add_norm,
            **place,
        )
        self.lm_head = nn.Linear(config.d_model, language.padded_vocab_size, bias=False, **place)
        self.config: Any = language
        initialise(self)  # type: ignore[arg-type]
        self.config = config
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """States before any token, by layer."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits (batch, seqlen, vocabulary) in `.logits`; of the last tokens only if num_last_tokens is positive.

        position_ids are not read: states know where they are.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "MambaLMHeadModel":
        """From a local folder with config.json and weights, safetensors or pytorch_model.bin; nothing is downloaded."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        # cast while it is copied, so that parameters kept in fp32 are not rounded first
        tensors = load_state_dict_hf(pretrained_model_name, device=device)
        if config.tie_embeddings and EMBEDDING in tensors:
            tensors.setdefault(HEAD, tensors[EMBEDDING])  # safetensors hold a shared tensor once
        model.load_state_dict(tensors)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and pytorch_model.bin, as the official class does."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4), "utf-8")
