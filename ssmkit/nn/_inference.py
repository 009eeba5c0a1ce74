"""What the mixers share when they carry a state: official inference_params, and the shape of one token."""

from typing import Any

from torch import Tensor


def carried_state(mixer: Any, state: Any, inference_params: Any, batch: int, **walk: Tensor | None) -> tuple[Any, bool]:
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
    return state, True


def cached_state(mixer: Any, inference_params: Any, batch: int) -> Any:
    """The state of a layer in `inference_params.key_value_memory_dict`; at offset 0 that before any token."""
    if mixer.layer_idx is None:
        raise ValueError("layer_idx must be given to the layer before it can keep its state in inference_params")
    cache = inference_params.key_value_memory_dict
    held = cache.get(mixer.layer_idx)
    if held is None or inference_params.seqlen_offset == 0:
        fresh = mixer.allocate_inference_cache(batch, getattr(inference_params, "max_seqlen", None))
        if held is not None and [part.shape for part in held] == [part.shape for part in fresh]:
            for part, start in zip(held, fresh, strict=True):
                part.copy_(start)
        else:
            # None yet, or that of a batch of another size that was read before.
            cache[mixer.layer_idx] = fresh
    return cache[mixer.layer_idx]


def check_one_token(name: str, tokens: Tensor, width: int) -> None:
    """`step` takes (batch, 1, width)."""
    if tokens.ndim != 3 or tokens.shape[1] != 1:
        raise ValueError(
            f"{name} must have shape (batch, 1, {width}), got {tuple(tokens.shape)}; "
            "use forward(..., state=...) for several tokens"
        )
