"""Choosing the next tokens: one forward over the prompts, then a step for each token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssmkit.models.language.model import LanguageModel


# Below it fp32 has no reciprocal; two logits that differ are told apart long before.
COLDEST = 1e-30
FP32 = torch.finfo(torch.float32)


class Step(NamedTuple):
    """One new token of every row, and what it was drawn from."""

    tokens: Tensor  # (batch,) int64
    logits: Tensor  # (batch, padded_vocab_size), as the model gave them


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: Logits are divided by it; 0 takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities sum to at least top_p (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: Keep tokens at least min_p times as probable as the most probable one (arXiv:2407.01082).
        repetition_penalty: Positive logits of tokens seen before are divided by it, negative ones multiplied
            (Keskar et al. 2019, arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        whole("top_k", self.top_k)
        for name, allowed, right in (
            ("temperature", "finite and at least 0", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
            ("repetition_penalty", "positive and finite", 0 < self.repetition_penalty < math.inf),
        ):
            if not right:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")

    def draw(self, logits: Tensor, seen: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A token per row.

        Args:
            logits: (batch, vocab)
            seen: Tokens that the repetition penalty is for, (batch, vocab) bool
            generator: Of random numbers, on the device of the logits.
        """
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1:
            factor = min(max(self.repetition_penalty, COLDEST), 1 / COLDEST)
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(seen, penalised.clamp(FP32.min, FP32.max), logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # The most probable is 0 before it is divided: what overflows, however cold, is the logit of an improbable token.
        kept = self.keep((logits - logits.amax(-1, keepdim=True)) / max(self.temperature, COLDEST))
        return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)

    def keep(self, logits: Tensor) -> Tensor:
        """Logits with minus infinity where top_k, top_p or min_p drop a token, in this order."""
        if 0 < self.top_k < logits.shape[-1]:
            last = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < last, -torch.inf)
        if self.top_p < 1:
            falling, order = logits.sort(descending=True, stable=True)
            probability = falling.softmax(-1)
            # dropped once those before it have enough; the first always stays
            enough = probability.cumsum(-1) - probability >= self.top_p
            enough[..., 0] = False
            logits = logits.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
        if self.min_p > 0:
            probability = logits.softmax(-1)
            least = self.min_p * probability.amax(-1, keepdim=True)
            logits = logits.masked_fill(probability < least, -torch.inf)
        return logits


def whole(name: str, value: Any) -> int:
    """An integer, also one of numpy or a tensor of one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def token_ids(name: str, given: Any, vocab: int) -> list[int]:
    """One token or several, however they are held, as a list; empty for None."""
    if isinstance(given, torch.Tensor) or hasattr(given, "__array__"):
        given = given.tolist()
    several = [] if given is None else given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    ids = [whole(name, token) for token in several]
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"{name} must be a token in 0..{vocab - 1}, got {token}")
    return ids


@torch.no_grad()
def steps(
    model: "LanguageModel",
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """The tokens that follow prompts, step after step.

    Args:
        model: The language model.
        input_ids: Prompts of at least one real token                    (batch, seqlen)
        max_new_tokens: At most so many steps; fewer if every row has ended.
        temperature, top_k, top_p, min_p, repetition_penalty: As in `Sampling`.
        eos_token_id: A row ends with this token, or with one of these: integers, a list, an array or a tensor.
        pad_token_id: What ended rows go on with; by default the (first) eos_token_id.
        mask: True at real tokens of the prompts, pads on either side    (batch, seqlen) bool
        generator: Of random numbers, on the device of the model.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    if whole("max_new_tokens", max_new_tokens) < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have shape (batch, seqlen) with seqlen >= 1, got {tuple(input_ids.shape)}")
    if mask is not None and not bool(mask.any(1).all()):
        raise ValueError("mask must leave every row at least one real token")
    ends = token_ids("eos_token_id", eos_token_id, model.config.padded_vocab_size)
    pads = token_ids("pad_token_id", pad_token_id, model.config.padded_vocab_size)
    if len(pads) > 1:
        raise ValueError(f"pad_token_id must be one token, got {pad_token_id!r}")
    batch, seqlen = input_ids.shape
    if max_new_tokens == 0 or batch == 0:
        return
    ending = torch.tensor(ends, device=input_ids.device)
    pad = pads[0] if pads else (ends[0] if ends else 0)

    state = model.allocate_inference_cache(batch, seqlen + max_new_tokens)
    hidden = model.hidden_states(input_ids, mask=mask, state=state)
    rows = torch.arange(batch, device=input_ids.device)
    last = torch.full_like(rows, seqlen - 1)
    if mask is not None:
        last = torch.where(mask, torch.arange(seqlen, device=mask.device), 0).amax(1)
    logits = model.lm_head(hidden[rows, last])

    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        real = input_ids if mask is None else torch.where(mask, input_ids, input_ids[rows, last][:, None])
        seen.scatter_(1, real.long(), True)
    ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        tokens = sampling.draw(logits, seen, generator)
        if ends:
            tokens = torch.where(ended, pad, tokens)
            ended = ended | torch.isin(tokens, ending)
        yield Step(tokens, logits)
        if step + 1 == max_new_tokens or (ends and bool(ended.all())):
            return
        if seen is not None:
            seen[rows, tokens] = True
        logits = model.step(tokens, state)
