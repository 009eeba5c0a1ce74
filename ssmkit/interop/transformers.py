"""Let transformers' models of the Mamba family run ssmkit's kernels.

Their modeling files call a handful of functions by name (`causal_conv1d_fn`, `mamba2_chunk_scan`, ...), which are plain
torch unless a CUDA package or a kernel from the hub stands in. `use_kernels` puts ssmkit's ops in their place.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from ssmkit.interop.finder import Served

# Folders of transformers.models whose mixers call the functions below.
MODELS = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "bamba",
    "zamba",
    "zamba2",
    "nemotron_h",
    "granitemoehybrid",
    "falcon_h1",
)
# Their name there, and the module and name here.
FUNCTIONS = {
    "causal_conv1d_fn": ("causal_conv1d", "causal_conv1d_fn"),
    "causal_conv1d_update": ("causal_conv1d", "causal_conv1d_update"),
    "mamba_selective_scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "mamba_selective_state_update": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "mamba2_selective_state_update": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "mamba2_chunk_scan": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
}
# Shortcuts of training, which answer None where there is no fused kernel: the mixer then calls the functions above.
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
# What models hand down to their kernels besides, which says nothing about the tokens' order ...
IGNORED = frozenset(
    {
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "token_type_ids",
        "use_associative_scan",
        "use_cache",
        "use_mambapy",
    }
)
# ... and what says where packed sequences lie, as seq_idx does; with it, these say it a second time.
OFFSETS = frozenset({"cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})

_REPLACED: dict[str, dict[str, Any]] = {}


def use_kernels(models: Iterable[str] = MODELS) -> "Served":
    """Run ssmkit's kernels inside transformers' models, those that exist already and those made later.

    Prefill, cached decoding and training, on a CPU or a GPU, at the numbers of their torch path up to rounding (states
    are kept in fp32 in models of lower precision). An activation other than SiLU still runs their own convolution.

        ssmkit.interop.transformers.use_kernels()              for the rest of the process
        with ssmkit.interop.transformers.use_kernels(): ...    for a while

    A model's call then raises ValueError for a keyword that would change the numbers and that the kernels do not know.

    Args:
        models: Folders of transformers.models, of those in MODELS.
    Returns:
        The models now served, whose kernels leaving the context takes away again; so does `restore`.
    Raises:
        ImportError: transformers is missing, or calls its kernels in another way than the versions known here (5.23).
            No model is changed then.
    """
    added: list[str] = []
    try:
        for name in _checked(models):
            if name not in _REPLACED:
                _replace(name)
                added.append(name)
    except BaseException:
        restore(added)
        raise
    return Served(sorted(_REPLACED), lambda: restore(added))


def restore(models: Iterable[str] = MODELS) -> None:
    """Give models their own functions back; those that are not served keep what they have."""
    for name in _checked(models):
        for function, original in _REPLACED.pop(name, {}).items():
            setattr(_modeling(name), function, original)


def _checked(models: Iterable[str]) -> tuple[str, ...]:
    wanted = (models,) if isinstance(models, str) else tuple(models)
    for name in wanted:
        if name not in MODELS:
            raise ValueError(f"models must be of {', '.join(MODELS)}; got {name!r}")
    return wanted


def _modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _replace(name: str) -> None:
    module = _modeling(name)
    found = {key: getattr(module, key) for key in (*FUNCTIONS, *FUSED) if hasattr(module, key)}
    if not {"causal_conv1d_fn", "causal_conv1d_update"} <= found.keys():
        from transformers import __version__

        raise ImportError(
            f"transformers {__version__} does not call causal_conv1d_fn in models.{name}; 5.23 does, install that one"
        )
    # Mamba-1's scan is not told where packed sequences begin.
    packs = "mamba2_chunk_scan" in found
    for key, original in found.items():
        setattr(module, key, _no_shortcut if key in FUSED else _in_place_of(key, original, packs))
    _REPLACED[name] = found


def _no_shortcut(*_: Any, **__: Any) -> None:
    return None


def _in_place_of(name: str, original: Callable[..., Any], packs: bool) -> Callable[..., Any]:
    place, ours = FUNCTIONS[name]
    run = getattr(importlib.import_module(f"ssmkit.interop.{place}"), ours)
    known = frozenset(inspect.signature(run).parameters) - {"backend", "cu_seqlens"}

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {key: value for key, value in kwargs.items() if value is not None}
        _refuse_unknown(name, given, known, packs)
        if kwargs.get("activation") not in (None, "silu", "swish"):
            if "seq_idx" in given:
                raise ValueError(
                    f"activation must be 'silu' or 'swish' for packed sequences, got {kwargs['activation']!r}; pad them"
                )
            return original(*args, **kwargs)
        return run(*args, **{key: value for key, value in kwargs.items() if key in known})

    return call


def _refuse_unknown(name: str, given: dict[str, Any], known: frozenset[str], packs: bool) -> None:
    """Let through what the function knows or what means nothing to it."""
    numbered = "seq_idx" in given
    positions = given.get("position_ids")
    packed = bool(OFFSETS & given.keys()) or (positions is not None and not numbered and _restarts(positions))
    if (numbered and not (packs and "seq_idx" in known)) or (packed and not numbered):
        way_out = "give seq_idx besides" if packs and not numbered else "pad the sequences instead of packing them"
        raise ValueError(f"{name} cannot keep these packed sequences apart; {way_out}")
    if given.get("is_causal") is False:
        raise ValueError(f"is_causal must be True: {name} runs over the tokens in their order; leave it out")
    unknown = sorted(given.keys() - known - IGNORED - OFFSETS - {"position_ids", "is_causal"})
    if unknown:
        raise ValueError(
            f"{name} got {', '.join(unknown)}, which it does not know and might change the result; "
            "leave it out of the model's call, or give the model its own kernels back by restore()"
        )


def _restarts(position_ids: torch.Tensor) -> bool:
    """Whether positions fall after they rose: several sequences in a row, not the constant positions of pads before one."""
    highest = position_ids.cummax(-1).values
    return bool(((position_ids < highest) & (highest > position_ids[..., :1])).any())
