"""Backbones by name, in the manner of timm: register_model, create_model, list_models."""

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn


class Entry(NamedTuple):
    """What makes a model: a class or function, and the options that its name stands for."""

    make: Callable[..., nn.Module]
    options: dict[str, Any]


_ENTRIES: dict[str, Entry] = {}


def register_model(name: str, make: Callable[..., nn.Module], **options: Any) -> None:
    """Let `create_model(name)` be `make(**options)`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _ENTRIES:
        raise ValueError(f"a model named {name!r} is already registered")
    _ENTRIES[name] = Entry(make, options)


def create_model(
    name: str,
    *,
    checkpoint_path: str | Path | Mapping[str, Tensor] | None = None,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    **overrides: Any,
) -> nn.Module:
    """A backbone by name, e.g. create_model("vmamba_tiny_s1l8", num_classes=10, drop_path_rate=0.1).

    Args:
        name: One of `list_models()`.
        checkpoint_path: A file of official weights, or their state dict, loaded strictly. Options that change the
            parameters (num_classes, in_chans) must be those of the weights; `reset_classifier` comes after.
        features_only: Return feature maps (batch, channels, height, width) in a list in place of logits.
        out_indices: Which levels then; all by default, negative ones count from the end.
        overrides: Arguments of the model's class in place of what the name stands for.
    Raises:
        ValueError: the name is unknown, or the weights do not fit.
        TypeError: the class has no such argument.
    """
    entry = entry_of(name)
    if out_indices is not None and not features_only:
        raise ValueError("out_indices chooses feature maps; give features_only=True as well")
    model = entry.make(**{**entry.options, **overrides})
    if checkpoint_path is not None:
        model.load_official(checkpoint_path)  # type: ignore[operator]
    if not features_only:
        return model
    from ssmkit.models.vision.backbone import FeatureList, VisionBackbone

    if not isinstance(model, VisionBackbone):
        raise ValueError(f"{name!r} has no feature maps: features_only must be False")
    return FeatureList(model, out_indices)


def entry_of(name: str) -> Entry:
    """The entry of a name, or an error that lists those it may have meant."""
    if name not in _ENTRIES:
        close = [known for known in _ENTRIES if name.split("_")[0] in known]
        raise ValueError(f"unknown model {name!r}, known: {', '.join(close or list_models())}")
    return _ENTRIES[name]


def takes(name: str, option: str) -> bool:
    """Whether a model's class, or a class it hands its options on to, has an argument of this name."""
    make = entry_of(name).make
    classes = make.__mro__ if isinstance(make, type) else ()
    signatures = [inspect.signature(vars(made)["__init__"]) for made in classes if "__init__" in vars(made)]
    return any(option in signature.parameters for signature in signatures or [inspect.signature(make)])


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, e.g. "vim_*", in order."""
    return sorted(name for name in _ENTRIES if fnmatchcase(name, pattern))
