"""Decoding with states in InferenceParams."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssmkit.models.language import Sampling


@dataclass
class InferenceParams:
    """Where layers keep their states, and how many tokens they have seen."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Before other prompts: no token has been seen. Layers clear their states at offset 0."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class Generated:
    """Prompts with what follows them (batch, length), and the logits each new token was drawn from, if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sampling_of(
    top_k: int, top_p: float, min_p: float, temperature: float, repetition_penalty: float = 1.0
) -> Sampling:
    """The official arguments as `Sampling`: top_k=1 is greedy, top_k=0 and top_p=0 keep all tokens."""
    return Sampling(
        temperature=0.0 if top_k == 1 else temperature,
        top_k=top_k,
        top_p=top_p if top_p > 0 else 1.0,
        # as there, read only without top_k
        min_p=min_p if top_k == 0 else 0.0,
        repetition_penalty=repetition_penalty,
    )


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """A token per row of logits (batch, vocabulary).

    min_p compares probabilities, as its paper says (arXiv:2407.01082); the official function compares logits.
    """
    return sampling_of(top_k, top_p, min_p, temperature).draw(logits)


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set logits below min_p, a logit itself and not a probability, to minus infinity in place; 0 < min_p < 1, else none."""
    if 0 < min_p < 1:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the top_k largest logits of each row to minus infinity in place; ties with the last are kept."""
    logits.masked_fill_(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set the tail that holds a probability of at most 1 - top_p to minus infinity in place; 0 < top_p < 1, else none."""
    if 0 < top_p < 1:
        ascending, order = logits.sort()
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits.masked_fill_(torch.empty_like(tail).scatter_(-1, order, tail), -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Divide positive logits of tokens seen before, multiply negative ones, in place: arXiv:1909.05858, section 4.1.

    Args:
        logits: (batch, vocabulary)
        prev_output_tokens: (batch, seqlen) int64
    """
    seen = logits.gather(1, prev_output_tokens)
    penalised = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, penalised)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Callable[..., Any],
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> Generated:
    """Sample until max_length tokens, prompt included, or until every row draws eos_token_id in one step.

    Args:
        input_ids: Prompts of one length              (batch, seqlen)
        model: Called as `MambaLMHeadModel` is.
        top_k, top_p, min_p, temperature, repetition_penalty: As in `sample`.
        teacher_outputs: Tokens to take instead of sampled ones  (batch, length)
        vocab_size: Read only so many logits.
        cg, enable_timing: Accepted for compatibility: no graph is captured, nothing is printed.
        output_scores: Keep the logits.
        streamer: Gets the prompts, then every new token, through put(), and end().
    """
    batch, seqlen = input_ids.shape
    if seqlen < 1:
        raise ValueError(f"input_ids must hold at least one token per row, got shape {tuple(input_ids.shape)}")
    how = sampling_of(top_k, top_p, min_p, temperature, repetition_penalty)
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    sequences, scores, seen = [input_ids], [], None
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while params.seqlen_offset == 0 or not (
        params.seqlen_offset >= max_length - 1
        or (eos_token_id is not None and bool((sequences[-1] == eos_token_id).all()))
    ):
        new = sequences[-1]
        position_ids = None
        if params.seqlen_offset:
            position_ids = torch.full((batch, 1), params.seqlen_offset, device=input_ids.device)
        logits = model(new, position_ids=position_ids, inference_params=params, num_last_tokens=1).logits.squeeze(1)
        logits = logits[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += new.shape[1]
        if repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
            seen = seen.scatter(1, new.long(), True)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset]
        else:
            tokens = how.draw(logits, seen)
        sequences.append(tokens[:, None].to(input_ids.dtype))
        if streamer is not None:
            streamer.put(sequences[-1].cpu())
    if streamer is not None:
        streamer.end()
    return Generated(torch.cat(sequences, dim=1), tuple(scores) if output_scores else None)


class GenerationMixin:
    """`generate` for models that are called as `MambaLMHeadModel` is."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """States before any token, by layer."""
        raise NotImplementedError(f"{type(self).__name__} must define allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | Generated:
        """Prompts and what follows them (batch, length), or `Generated`; arguments as in `decode`."""
        assert callable(self)
        output = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs
        )
        return output if return_dict_in_generate else output.sequences
