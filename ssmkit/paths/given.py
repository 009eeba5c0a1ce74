"""Sizes and places as callers give them, read without torch: a default device or a mode has no part in a path."""

from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

Indices = NDArray[np.integer[Any]]


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int of at least `least`."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
    return number


def sizes(least: int = 0, **named: Any) -> list[int]:
    """The values as ints of at least `least`."""
    return [integer(name, value, least) for name, value in named.items()]


def array_of(name: str, values: Any) -> NDArray[Any]:
    """The values as an array on the CPU; an empty list has no dtype of its own and counts as integers."""
    if isinstance(values, Tensor):
        if values.is_meta or isinstance(values, FakeTensor):
            raise ValueError(
                f"{name} must hold numbers, got a {type(values).__name__} without data on {values.device}; "
                "make the path from a list, an array or a tensor with data"
            )
        with _disable_current_modes():
            values = values.detach().cpu()
            if values.is_floating_point() or values.is_complex():  # of a dtype that numpy may lack
                values = values.to(torch.complex128 if values.is_complex() else torch.float64)
            values = values.numpy()
    elif isinstance(values, list | tuple):
        values = [index(value) if isinstance(value, torch.SymInt) else value for value in values]
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold integers, got {type(values).__name__}: {error}") from error
    return array if array.size else array.astype(np.int64)


def are_integers(array: NDArray[Any]) -> bool:
    """Whether the dtype is one of integers, bool not among them."""
    return array.dtype.kind in "iu"
