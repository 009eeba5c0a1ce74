"""Named tensors of models, read, written and fitted strictly: what every family's loader is made of."""

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

AT_MOST = 8  # names in one message
# What training scripts wrap their tensors in, and what wrappers of a module put before each name.
WRAPPERS = ("model", "module", "state_dict", "model_ema")
PREFIXES = ("module.", "_orig_mod.")


def read(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of some files; a name that stands in two of them is an error."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_file(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(f"{file}: {some(twice)} also in another file of the same weights")
        tensors |= found
    return tensors


def read_file(file: Path) -> dict[str, Any]:
    """What a file holds: tensors by name, or what a training script saved around them. Runs no code from the file."""
    if file.suffix == ".safetensors":
        tensors: dict[str, Any] = safetensors().load_file(file)
        return tensors
    # Published vision checkpoints hold their command line besides.
    with torch.serialization.safe_globals([Namespace]):
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(saved, Mapping):
        raise ValueError(f"{file} holds a {type(saved).__name__}, not tensors by name")
    return dict(saved)


def unwrapped(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their plain names.

    Taken out of WRAPPERS, the first that is there ("model" before "model_ema"), and with PREFIXES cut off.
    """
    wrapper = next((name for name in WRAPPERS if isinstance(saved.get(name), Mapping)), None)
    if wrapper is not None:
        return unwrapped(saved[wrapper])
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}, not a tensor; hand over the state dict itself")
        plain = name
        while plain.startswith(PREFIXES):
            plain = plain.split(".", 1)[1]
        if plain in tensors:
            raise ValueError(f"two tensors are {plain}, one of them called {name}")
        tensors[plain] = tensor
    return tensors


def fit(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str, device: torch.device | str) -> None:
    """Make tensors the parameters and buffers of a model, each in the dtype of the one it replaces.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the model is as before.
    """
    wanted = model.state_dict()
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unknown:
        problems = [f"{what} {some(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(problems)}")
    shapes = [
        f"{name} must have shape {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != wanted[name].shape
    ]
    if shapes:
        raise ValueError(f"{source}: {some(shapes)}")
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    # Tensors that are read from a file may be mapped from it: without a copy, rewriting the file would end the process.
    placed = {name: tensor.to(device, wanted[name].dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks.get(name, {}))  # a tied parameter counts under one of its names only


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place once it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def some(names: Iterable[str]) -> str:
    """The first few of some names."""
    ordered = sorted(names)
    rest = len(ordered) - AT_MOST
    return ", ".join(ordered[:AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def safetensors() -> Any:
    """safetensors.torch, which is installed with the extra `language`."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing *.safetensors needs safetensors: pip install 'ssmkit[language]'"
        ) from error
    return safetensors.torch
