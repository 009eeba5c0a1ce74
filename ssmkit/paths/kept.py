"""Results kept by their arguments, in eager code and in compiled graphs."""

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import index
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

# What compiled graphs were made with, kept as long as they may run.
_COMPILED = SimpleNamespace()
_NAMES: dict[Any, str] = {}


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which torch.compile runs once, while it traces.

    The result reaches the graph as an attribute of a global, which torch.compile can look into and may meet often; what
    `torch.compiler.assume_constant_result` returns it cannot.
    """

    @torch.compiler.assume_constant_result
    def named(*args: Any, **kwargs: Any) -> str:
        key = (make, tuple(map(_hashable, args)), tuple((name, _hashable(value)) for name, value in kwargs.items()))
        name = _NAMES.setdefault(key, f"result_{len(_NAMES)}")
        setattr(_COMPILED, name, make(*args, **kwargs))
        return name

    @wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            concrete = {name: _concrete(value) for name, value in kwargs.items()}
            return cast(R, getattr(_COMPILED, named(*[_concrete(value) for value in args], **concrete)))
        return make(*args, **kwargs)

    return call


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """`make` with its latest results kept by their arguments; `constant` too."""
    latest = lru_cache(maxsize=64, typed=True)(make)

    @wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hashable: dict[str, Any] = {name: _hashable(value) for name, value in kwargs.items()}
        return latest(*map(_hashable, args), **hashable)

    return constant(call)


def _concrete(value: Any) -> Any:
    """A size that torch.compile left open, settled."""
    return index(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
