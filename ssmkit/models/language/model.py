"""The language model: embedding, residual blocks of Mamba or attention, head.

Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.4, and Dao & Gu 2024, arXiv:2405.21060, section 7; hybrids with
attention layers as in its section 9.2.3. Parameter names and initialisation are those of `MambaLMHeadModel`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ssmkit.models.language import sampling
from ssmkit.models.language.config import MIXERS, LanguageModelConfig
from ssmkit.nn import MHA, GatedMLP, Mamba2, MambaStack
from ssmkit.nn.linear import project

State = list[tuple[Tensor, ...]]


class Backbone(MambaStack):
    """Embedding, blocks, final norm: names `embedding`, `layers.{i}.norm|mixer|norm2|mlp`, `norm_f`."""

    def __init__(self, config: LanguageModelConfig, **place: Any) -> None:
        def mixer(index: int) -> nn.Module:
            common: dict[str, Any] = {"layer_idx": index, "backend": config.backend, **place}
            if index in config.attn_layer_idx:
                return MHA(config.d_model, **config.attention_options(), **common)
            made = MIXERS[config.layer](config.d_model, **config.mixer_options(), **common)
            if isinstance(made, Mamba2) and made.norm is not None:
                made.norm.eps = config.norm_eps
            return made

        def mlp(index: int) -> nn.Module:
            return GatedMLP(config.d_model, config.d_intermediate, **place)

        super().__init__(
            config.d_model,
            config.n_layer,
            norm_eps=config.norm_eps,
            rms_norm=config.rms_norm,
            residual_in_fp32=config.residual_in_fp32,
            make_mixer=mixer,
            make_mlp=mlp if config.d_intermediate else None,
            backend=config.backend,
            **place,
        )
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **place)


class LanguageModel(nn.Module):
    """Next-token model over Mamba-1, Mamba-2 or Mamba-3 layers, hybrid with attention where `attn_layer_idx` says so.

        h = embedding(ids);   h <- blocks(h);   logits = norm_f(h) W^T,   W the embedding if tied

    Args:
        config: Sizes and choices.
        device, dtype: Of the parameters; A_log and D (of Mamba-1 and D of Mamba-2) stay in fp32.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        initialise(self)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        num_last_tokens: int = 0,
    ) -> Tensor:
        """Logits of the next token at every position                  (batch, seqlen, padded_vocab_size)

        Args:
            input_ids: Tokens                                            (batch, seqlen) int64 or int32
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            resets: Tokens that drop everything before them              (batch, seqlen) bool
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
            state: From `allocate_inference_cache`; continued and updated in place. With cu_seqlens one per sequence.
            num_last_tokens: Compute logits of the last tokens only; 0 is all.
        """
        if num_last_tokens < 0:
            raise ValueError(f"num_last_tokens must be at least 0, got {num_last_tokens}; 0 is all")
        hidden = self.hidden_states(input_ids, mask=mask, resets=resets, cu_seqlens=cu_seqlens, state=state)
        return self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens else hidden)

    def hidden_states(self, input_ids: Tensor, *, state: State | None = None, **walk: Any) -> Tensor:
        """What the head reads, (batch, seqlen, d_model); arguments as for `forward`."""
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be int64 or int32 of shape (batch, seqlen), got {input_ids.dtype} "
                f"of shape {tuple(input_ids.shape)}"
            )
        if state is not None and len(state) != self.config.n_layer:
            raise ValueError(
                f"state must hold {self.config.n_layer} layers, got {len(state)}; make it with allocate_inference_cache"
            )
        given = {name: value for name, value in walk.items() if value is not None}
        return self.backbone(self.backbone.embedding(input_ids), state=state, **given)

    def step(self, token_ids: Tensor, state: State) -> Tensor:
        """One token per row: token_ids (batch,) or (batch, 1); logits (batch, padded_vocab_size).

        `state` is updated in place.
        """
        if token_ids.ndim not in (1, 2) or token_ids.shape[1:].numel() != 1:
            raise ValueError(
                f"token_ids must have shape (batch,) or (batch, 1), got {tuple(token_ids.shape)}; "
                "use forward(..., state=...) for several tokens"
            )
        hidden = self.backbone.embedding(token_ids.reshape(-1, 1))
        return project(self.lm_head, self.backbone.step(hidden, state).squeeze(1))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before any token. max_seqlen is the room of attention layers; Mamba layers need none."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """The next tokens (batch,), one step after another, as they come; options as for `generate`."""
        return (step.tokens for step in sampling.steps(self, input_ids, max_new_tokens, **options))

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, *, return_logits: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts and what follows them                                (batch, seqlen + new)

        One forward over the prompts leaves the states, then every token is one step.

        Args:
            input_ids: Prompts                                           (batch, seqlen)
            max_new_tokens: At most so many; fewer if every row has ended.
            return_logits: Also return the logits each new token was drawn from  (batch, new, padded_vocab_size)
            options: of `ssmkit.models.language.sampling.steps`: temperature, top_k, top_p, min_p, repetition_penalty,
                eos_token_id, pad_token_id, mask, generator.
        """
        steps = list(sampling.steps(self, input_ids, max_new_tokens, **options))
        tokens = torch.cat([input_ids, *(step.tokens[:, None].to(input_ids.dtype) for step in steps)], dim=1)
        if not return_logits:
            return tokens
        width = self.config.padded_vocab_size
        logits = [step.logits for step in steps]
        empty = self.lm_head.weight.new_zeros(len(input_ids), 0, width)
        return tokens, torch.stack(logits, dim=1) if logits else empty


@torch.no_grad()
def initialise(model: LanguageModel) -> None:
    """Start values, as in `MambaLMHeadModel`.

    Biases of linear layers 0 (those of step sizes apart), embedding N(0, 0.02), output projections as nn.Linear has them,
    divided by the root of how many of them are added up in the residual stream. A head that is not tied stays as nn.Linear
    makes it.
    """
    config = model.config
    adds = config.n_layer * (2 if config.count_mlp_in_init and config.d_intermediate else 1)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.backbone.embedding.weight, std=0.02)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            parameter.div_(math.sqrt(adds))
