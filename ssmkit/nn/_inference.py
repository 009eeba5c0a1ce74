"""What the mixers share when they carry a state: official inference_params, and the shape of one token."""

from typing import Any

import torch
from torch import Tensor


def carried_state(mixer: Any, state: Any, inference_params: Any, batch: int, **walk: Any) -> tuple[Any, bool]:
    """The state that a call continues, None if none, and whether its tokens go through `step`.

    Args:
        mixer: The layer, with `layer_idx` and `allocate_inference_cache`.
        state, inference_params: As `forward` was given them; at most one of them.
        batch: Sequences of the call.
        walk: mask, resets and the like, which single tokens do not take.
    """
    if inference_params is None:
        return state, False
    if state is not None:
        raise ValueError("state and inference_params both carry the state; give one of them")
    state = cached_state(mixer, inference_params, batch)
    if inference_params.seqlen_offset == 0:
        return state, False
    if any(given is not None for given in walk.values()):
        *names, last = walk
        raise ValueError(f"one token after another takes no {', '.join(names)} or {last}; pass state instead")
    if len(state[0]) != batch:
        raise ValueError(
            f"inference_params holds the states of {len(state[0])} sequences at seqlen_offset "
            f"{inference_params.seqlen_offset}, got a batch of {batch}; begin again with seqlen_offset 0"
        )
    return state, True


def cached_state(mixer: Any, inference_params: Any, batch: int) -> Any:
    """The state of a layer in `inference_params.key_value_memory_dict`; at offset 0 that before any token."""
    if mixer.layer_idx is None:
        raise ValueError("layer_idx must be given to the layer before it can keep its state in inference_params")
    cache = inference_params.key_value_memory_dict
    held = cache.get(mixer.layer_idx)
    if held is None or inference_params.seqlen_offset == 0:
        fresh = mixer.allocate_inference_cache(batch, getattr(inference_params, "max_seqlen", None))
        if held is not None and all(map(_holds, held, fresh)):
            for part, start in zip(held, fresh, strict=True):
                part.copy_(start)
        else:
            # None yet, or that of another batch, of the layer before it was moved, or of inference mode.
            cache[mixer.layer_idx] = fresh
    elif any(map(_is_frozen, held)):
        cache[mixer.layer_idx] = tuple(part.clone() for part in held)
    return cache[mixer.layer_idx]


def _holds(part: Tensor, start: Tensor) -> bool:
    """Whether `part` of a state can be set to `start`, which leaves it where captured graphs read it."""
    return (part.shape, part.dtype, part.device) == (start.shape, start.dtype, start.device) and not _is_frozen(part)


def _is_frozen(part: Tensor) -> bool:
    """Whether `part` is of inference mode, which alone may write it, and that is over. Compiled code cannot ask."""
    return not torch.compiler.is_compiling() and part.is_inference() and not torch.is_inference_mode_enabled()


def check_one_token(name: str, tokens: Tensor, width: int) -> None:
    """`step` takes (batch, 1, width)."""
    if tokens.ndim != 3 or tokens.shape[1] != 1:
        raise ValueError(
            f"{name} must have shape (batch, 1, {width}), got {tuple(tokens.shape)}; "
            "use forward(..., state=...) for several tokens"
        )
