"""`ScanPath`: the order of a scan as data, and the tables that kernels read it from."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

from ssmkit.paths.given import Indices, are_integers, array_of, integer, sizes
from ssmkit.paths.kept import constant, kept


class Strides(NamedTuple):
    """An affine walk: a counter with digits i_k below `sizes`, the last the fastest, visits start + sum_k i_k strides_k."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0


class ScanPath:
    """An order over `length` tokens: position p of the walk visits token `order[p]`.

    Affine walks (identity, columns, any order of the axes) keep no table until a kernel asks for one, other orders an
    int32 table; tables are made once per device and shared by equal orders. A path does not change once made.

    Restarts stand between two positions: the state does not pass from the one before into the restart. The walk up to
    the first restart begins with the initial state.

    Args:
        order: The tokens in the order of the walk     (length,)   integers, a permutation of 0..length-1
        restarts: Positions of the walk at which the state starts anew  (any,)  integers in 0..length-1
        shape: Sizes of the grid that the tokens form, last axis fastest: (height, width) or (frames, height, width)
    Raises:
        ValueError: `order` is not a permutation, a restart lies outside the walk, or `shape` holds another number of
            tokens.
    """

    length: int
    shape: tuple[int, ...] | None
    reversed: bool  # the walk goes from the last entry of `order(device)` to the first
    strides: Strides | None  # what `order(device)` holds, where it is affine
    name: str

    def __init__(
        self,
        order: Tensor | Sequence[int],
        *,
        restarts: Tensor | Sequence[int] = (),
        shape: Sequence[int] | None = None,
    ) -> None:
        tokens = _indices("order", order)
        if not np.array_equal(np.sort(tokens), np.arange(len(tokens))):
            raise ValueError(f"order must be a permutation of 0..{len(tokens) - 1}: {_fault(tokens)}")
        self._build(tokens, restarts=restarts, shape=shape)

    @classmethod
    def identity(cls, length: int, *, restarts: Tensor | Sequence[int] = ()) -> "ScanPath":
        """The tokens as they lie."""
        return _line(length, False, restarts)

    @classmethod
    def reverse(cls, length: int, *, restarts: Tensor | Sequence[int] = ()) -> "ScanPath":
        """From the last token to the first."""
        return _line(length, True, restarts)

    @classmethod
    def of(
        cls,
        walk: Strides | Indices,
        *,
        backwards: bool = False,
        restarts: Tensor | Indices | Sequence[int] = (),
        shape: Sequence[int] | None = None,
        name: str = "",
    ) -> "ScanPath":
        """A path from a walk that is known to be a permutation."""
        path = cls.__new__(cls)
        path._build(walk, backwards=backwards, restarts=restarts, shape=shape, name=name)
        return path

    def _build(
        self,
        walk: Strides | Indices,
        *,
        backwards: bool = False,
        restarts: Tensor | Indices | Sequence[int] = (),
        shape: Sequence[int] | None = None,
        name: str = "",
    ) -> None:
        walk = _checked(walk) if isinstance(walk, Strides) else _indices("walk", walk)
        shape = None if shape is None else tuple(sizes(shape=size)[0] for size in shape)
        length = prod(walk.sizes) if isinstance(walk, Strides) else len(walk)
        if length >= 2**31:
            raise ValueError(f"a path must have fewer than 2**31 tokens, got {length}")
        if shape is not None and prod(shape) != length:
            raise ValueError(f"shape must hold the {length} tokens of the path, got {shape}")
        places = _places(restarts, length)
        if isinstance(walk, Strides):
            walk = _merged(walk)
            line = walk.strides == (1,) and walk.start == 0
            table = _table(f"{tuple(walk)}", partial(_tokens_of, walk))
        else:
            forwards = np.arange(length)
            line = np.array_equal(walk, forwards)
            if not line and np.array_equal(walk[::-1], forwards):
                line, backwards = True, not backwards
            kept = forwards if line else walk.astype(np.int32)
            walk = Strides((length,), (1,)) if line else kept
            table = _table(_digest(kept), partial(_tokens_of, walk))
        # A path and its flip are one pair: what either keeps, both have, and flipping twice is the path itself.
        there = np.where(places > 0, length - places, 0)
        other = ScanPath.__new__(ScanPath)
        for path, reverse, starts in ((self, backwards, places), (other, not backwards, np.sort(there))):
            path.length, path.reversed, path.name = length, reverse, name
            path.shape = shape
            path.strides = walk if isinstance(walk, Strides) else None
            path._walk, path._starts = walk, starts
            path._order = None if line else table
            path._flags = None
            if len(starts):
                make = partial(_flags_of, walk, reverse, starts)
                path._flags = _table(f"{table.name} {reverse} {_digest(starts)}", make)
            path._order_name = None if path._order is None else path._order.name
            path._flags_name = None if path._flags is None else path._flags.name
        self._other, other._other = other, self

    _walk: Strides | Indices
    _starts: Indices
    _order: "_Table | None"
    _flags: "_Table | None"
    _order_name: str | None
    _flags_name: str | None
    _other: "ScanPath"

    def flip(self) -> "ScanPath":
        """The walk backwards, at no cost: the same table, and the state passes between the same neighbours.

        A restart therefore moves to the other end of its segment, while `reverse=True` of an op leaves it at its token.
        """
        return self._other

    def with_restarts(self, restarts: Tensor | Sequence[int]) -> "ScanPath":
        """The same walk with other restarts, given as positions of the walk."""
        return _with_restarts(self, self.shape, self.name, restarts)

    def with_tokens(self, at: int, count: int = 1, *, position: int | None = None) -> "ScanPath":
        """The walk with `count` more tokens in it, such as class tokens.

        Args:
            at: Row at which they lie, 0..length; the tokens from there on move up by `count`.
            count: How many, in one piece, visited in the order in which they lie.
            position: Where in the walk the first is visited, 0..length; `at` by default. At a restart they are visited
                before it.
        Returns:
            A path over length + count tokens, without a shape.
        """
        return _with_tokens(self, self.name, at, count, position)

    def tokens(self) -> Tensor:
        """The tokens in the order of the walk, (length,) int64 on the CPU."""
        return torch.from_numpy(self._visits())

    def inverse(self) -> Tensor:
        """The position at which each token is visited, (length,) int64 on the CPU."""
        return torch.from_numpy(ranks_of(self._visits()))

    def restart_positions(self) -> Tensor:
        """The positions of the walk at which the state starts anew, ascending, (any,) int64 on the CPU."""
        return torch.from_numpy(self._starts.copy())

    def order(self, device: torch.device) -> Tensor | None:
        """The int32 table on `device`, to be read backwards if `reversed`; None where it would be 0, 1, 2, ..."""
        return None if self._order_name is None else _on(self._order_name, device)

    def restarts(self, device: torch.device) -> Tensor | None:
        """Which tokens restart the state, (length,) bool on `device`, or None if none does."""
        return None if self._flags_name is None else _on(self._flags_name, device)

    def _visits(self) -> Indices:
        tokens = _tokens_of(self._walk).astype(np.int64)
        return tokens[::-1].copy() if self.reversed else tokens

    def _visit(self, position: int) -> int:
        if self.reversed:
            position = self.length - 1 - position
        if not isinstance(self._walk, Strides):
            return int(self._walk[position])
        token = self._walk.start
        for size, stride in zip(reversed(self._walk.sizes), reversed(self._walk.strides), strict=True):
            position, digit = divmod(position, size)
            token += digit * stride
        return token

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        """Whether both visit the same tokens in the same order with the same restarts."""
        if not isinstance(other, ScanPath):
            return NotImplemented
        if self.length != other.length or not np.array_equal(self._starts, other._starts):
            return False
        same_table = self._order_name == other._order_name and self.reversed == other.reversed
        return same_table or np.array_equal(self._visits(), other._visits())

    def __hash__(self) -> int:
        few = tuple(self._visit(p) for p in {0, self.length // 3, self.length // 2} if p < self.length)
        return hash((self.length, len(self._starts), few))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._walk, self.reversed, self._starts, self.shape, self.name)

    def __repr__(self) -> str:
        line = self._order is None
        kind = self.name or ("line" if line else "permutation" if self.strides is None else "strided")
        if self.shape is not None:
            kind += " over " + " x ".join(str(size) for size in self.shape)
        if self.reversed:
            kind += ", backwards"
        return f"ScanPath({kind}, length={self.length}, restarts={len(self._starts)})"


@kept
def _line(length: int, backwards: bool, restarts: Any) -> ScanPath:
    (length,) = sizes(length=length)
    return ScanPath.of(Strides((length,), (1,)), backwards=backwards, restarts=restarts)


# Equal paths may differ in shape and name, so what hands these on has them among its arguments.
@kept
def _with_restarts(path: ScanPath, shape: tuple[int, ...] | None, name: str, restarts: Any) -> ScanPath:
    return ScanPath.of(path._walk, backwards=path.reversed, restarts=restarts, shape=shape, name=name)


@kept
def _with_tokens(path: ScanPath, of: str, at: int, count: int, position: int | None) -> ScanPath:
    at, count = integer("at", at), integer("count", count)
    position = at if position is None else integer("position", position)
    for name, value in (("at", at), ("position", position)):
        if not 0 <= value <= path.length:
            raise ValueError(f"{name} must lie in 0..{path.length}, the length of the path, got {value}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    tokens = path._visits()
    tokens = np.insert(np.where(tokens < at, tokens, tokens + count), position, np.arange(at, at + count))
    starts = np.where((path._starts >= position) & (path._starts > 0), path._starts + count, path._starts)
    return ScanPath.of(tokens, restarts=starts, name=f"{of} with tokens".strip())


def _rebuilt(
    walk: Strides | Indices, backwards: bool, starts: Indices, shape: tuple[int, ...] | None, name: str
) -> ScanPath:
    return ScanPath.of(walk, backwards=backwards, restarts=starts, shape=shape, name=name)


class _Table:
    """An array that is made when it is asked for, and kept once per device."""

    def __init__(self, name: str, make: Callable[[], NDArray[Any]]) -> None:
        self.name, self._make = name, make
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            # The table outlives the mode that its first reader is in: inference, or the fake tensors of an export.
            with torch.inference_mode(False), _disable_current_modes():
                self._on.setdefault(device, torch.from_numpy(self._make()).to(device))
        return self._on[device]


# A name tells the content, so equal tables are one object and a compiled graph asks for its table by name.
_TABLES: WeakValueDictionary[str, _Table] = WeakValueDictionary()
_NAMING = threading.RLock()  # two paths made at once must hold the one table that has the name


def _table(name: str, make: Callable[[], NDArray[Any]]) -> _Table:
    with _NAMING:
        return _TABLES.setdefault(name, _Table(name, make))


def _on(name: str, device: torch.device) -> Tensor:
    table = _named(name, device)
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return table
    return _as_read(table)


@constant
def _named(name: str, device: torch.device) -> Tensor:
    return _TABLES[name].on(device)


def _as_read(table: Tensor) -> Tensor:
    """The table as the active mode of fake tensors wants it, where there is one and it takes no other tensors."""
    mode = active_fake_mode()
    if mode is None or mode.allow_non_fake_inputs:
        return table
    return mode.from_tensor(table, static_shapes=True)


def _digest(array: NDArray[Any]) -> str:
    return f"{array.dtype} {len(array)} {hashlib.sha256(array.tobytes()).hexdigest()}"


def _tokens_of(walk: Strides | Indices) -> Indices:
    if not isinstance(walk, Strides):
        return walk
    tokens = np.full(1, walk.start, np.int32)
    for size, stride in zip(walk.sizes, walk.strides, strict=True):
        tokens = (tokens[:, None] + np.arange(size, dtype=np.int32) * np.int32(stride)).reshape(-1)
    return tokens


def _flags_of(walk: Strides | Indices, backwards: bool, starts: Indices) -> NDArray[np.bool_]:
    tokens = _tokens_of(walk)
    flags = np.zeros(len(tokens), np.bool_)
    flags[tokens[len(tokens) - 1 - starts if backwards else starts]] = True
    return flags


def _merged(walk: Strides) -> Strides:
    """The same walk with as few digits as can be; that of 0, 1, 2, ... has one, of stride 1."""
    length = prod(walk.sizes)
    if length <= 1:
        return Strides((length,), (1,))
    digits: list[tuple[int, int]] = []
    for size, stride in zip(walk.sizes, walk.strides, strict=True):
        if size == 1:
            continue
        if digits and digits[-1][1] == size * stride:
            size *= digits.pop()[0]
        digits.append((size, stride))
    sizes, strides = zip(*digits, strict=True)
    return Strides(sizes, strides, walk.start)


def ranks_of(tokens: Indices) -> Indices:
    """The position at which each token is visited."""
    ranks = np.empty_like(tokens)
    ranks[tokens] = np.arange(len(tokens))
    return ranks


def _checked(walk: Strides) -> Strides:
    if len(walk.sizes) != len(walk.strides):
        raise ValueError(f"walk must have one stride for each size, got {walk}")
    lengths = tuple(integer("sizes of walk", size, 0) for size in walk.sizes)
    return Strides(lengths, tuple(integer("strides of walk", s) for s in walk.strides), integer("start", walk.start))


def _indices(name: str, values: Any) -> Indices:
    array = array_of(name, values)
    if array.ndim != 1 or not are_integers(array):
        raise ValueError(f"{name} must be one-dimensional and of integers, got shape {array.shape} of {array.dtype}")
    return array.astype(np.int64, copy=False)


def _places(restarts: Tensor | Indices | Sequence[int], length: int) -> Indices:
    places = array_of("restarts", restarts).reshape(-1)
    if not places.size:
        return np.zeros(0, np.int64)
    if not are_integers(places):
        raise ValueError(f"restarts must be positions of the walk, integers, got {places.dtype}")
    ascending = np.unique(places.astype(np.int64))
    if ascending[0] < 0 or ascending[-1] >= length:
        raise ValueError(f"restarts must lie in 0..{length - 1}, got {places.tolist()[:8]}")
    return ascending


def _fault(tokens: Indices) -> str:
    outside = tokens[(tokens < 0) | (tokens >= len(tokens))]
    if len(outside):
        return f"it holds {outside[0]}"
    values, counts = np.unique(tokens, return_counts=True)
    return f"token {values[counts.argmax()]} is visited {counts.max()} times"
