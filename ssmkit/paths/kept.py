"""Results kept by their arguments, in eager code and in compiled graphs."""

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import index
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch

from ssmkit.paths.given import array_of

P = ParamSpec("P")
R = TypeVar("R")

# What compiled graphs were made with. The graphs find it here by name at every call, so an entry must stay for as long as
# its graph may run, which nothing tells. Only tracing adds to it: torch.compile stops after `recompile_limit` sizes.
_COMPILED = SimpleNamespace()
_NAMES: dict[Any, str] = {}

PLAIN = frozenset((int, str, bool, type(None)))


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which torch.compile runs once, while it traces.

    The result reaches the graph as an attribute of a global, which torch.compile can look into and may meet often; what
    `torch.compiler.assume_constant_result` returns it cannot.
    """

    @torch.compiler.assume_constant_result
    def named(*args: Any, **kwargs: Any) -> str:
        key = (make, tuple(map(hashable, args)), tuple((name, hashable(value)) for name, value in kwargs.items()))
        name = _NAMES.setdefault(key, f"result_{len(_NAMES)}")
        setattr(_COMPILED, name, make(*args, **kwargs))
        return name

    @wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            concrete = {name: _concrete(value) for name, value in kwargs.items()}
            return cast(R, getattr(_COMPILED, named(*[_concrete(value) for value in args], **concrete)))
        return make(*args, **kwargs)

    return call


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """`make` with its latest results kept by their arguments; `constant` too."""

    @lru_cache(maxsize=64, typed=True)
    def latest(types: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return make(*args, **kwargs)

    @wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = [value if type(value) in PLAIN else hashable(value) for value in args]
        named: Any = {name: value if type(value) in PLAIN else hashable(value) for name, value in kwargs.items()}
        # 2, 2.0 and True are equal, but not as sizes, in a tuple neither.
        types = [_types(value) for value in (*given, *named.values()) if type(value) is tuple]
        return latest(tuple(types), *given, **named)

    return constant(call)


def hashable(value: Any) -> Any:
    """Lists, arrays and tensors as tuples, single numbers among them as numbers; sizes that a trace left open, settled."""
    if isinstance(value, torch.SymInt):
        return index(value)
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = array_of("a size or places", value).tolist()
    return tuple(map(hashable, value)) if isinstance(value, list | tuple | range) else value


def _types(values: tuple[Any, ...]) -> Any:
    return tuple([_types(value) if type(value) is tuple else type(value) for value in values])


def _concrete(value: Any) -> Any:
    """A size that torch.compile left open, settled."""
    if isinstance(value, list | tuple):
        return tuple([_concrete(each) for each in value])
    return index(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value
