"""Scan paths: the order in which a scan visits the tokens, as data.

A `ScanPath` is a permutation of the tokens plus the places where the state restarts. Kernels read row `path[p]` and
write row `path[p]`, so no tensor is ever rearranged for a scan order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class ScanPath:
    """An order over `length` tokens: position p of the walk visits token `order[p]`.

    Identity and reverse are affine walks and keep no table; any other order keeps an int32 table, copied to each
    device once.

    Args:
        order: The tokens in the order of the walk     (length,)   integers, a permutation of 0..length-1
        restarts: Positions of the walk at which the state starts anew  (any,)  integers in 0..length-1
    Raises:
        ValueError: `order` is not a permutation, or a restart lies outside the walk.
    """

    length: int
    reversed: bool

    def __init__(self, order: Tensor | Sequence[int], *, restarts: Tensor | Sequence[int] = ()) -> None:
        table = torch.as_tensor(order)
        if table.shape == (0,):
            table = table.long()  # an empty list has no dtype of its own
        if table.ndim != 1 or table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
            raise ValueError(
                f"order must be one-dimensional and of integers, got shape {tuple(table.shape)} of {table.dtype}"
            )
        table = table.to(device="cpu", dtype=torch.int64)
        if table.numel() >= 2**31:
            raise ValueError(f"order must have fewer than 2**31 tokens, got {table.numel()}")
        self._fill(table.numel(), table, backwards=False, restarts=restarts)
        if not torch.equal(table.sort().values, torch.arange(table.numel())):
            raise ValueError(f"order must be a permutation of 0..{table.numel() - 1}: {self._fault(table)}")

    @classmethod
    def identity(cls, length: int, *, restarts: Tensor | Sequence[int] = ()) -> "ScanPath":
        """The tokens as they lie."""
        path = cls.__new__(cls)
        path._fill(length, None, backwards=False, restarts=restarts)
        return path

    @classmethod
    def reverse(cls, length: int, *, restarts: Tensor | Sequence[int] = ()) -> "ScanPath":
        """From the last token to the first."""
        path = cls.__new__(cls)
        path._fill(length, None, backwards=True, restarts=restarts)
        return path

    def _fill(self, length: int, table: Tensor | None, backwards: bool, restarts: Tensor | Sequence[int]) -> None:
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        places = torch.as_tensor(restarts, dtype=torch.int64).cpu().flatten()
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= length):
            raise ValueError(f"restarts must lie in 0..{length - 1}, got {places.tolist()[:8]}")
        self.length = length
        self.reversed = backwards
        self._order: dict[torch.device, Tensor] = {}
        self._restarts: dict[torch.device, Tensor] = {}
        cpu = torch.device("cpu")
        if table is not None:
            self._order[cpu] = table.to(torch.int32)
        if places.numel():
            self._restarts[cpu] = torch.zeros(length, dtype=torch.bool).index_fill_(0, self.tokens()[places], True)

    @staticmethod
    def _fault(table: Tensor) -> str:
        outside = table[(table < 0) | (table >= table.numel())]
        if outside.numel():
            return f"it holds {int(outside[0])}"
        values, counts = table.unique(return_counts=True)
        repeated = int(counts.argmax())
        return f"token {int(values[repeated])} is visited {int(counts[repeated])} times"

    def tokens(self) -> Tensor:
        """The tokens in the order of the walk, (length,) int64 on the CPU."""
        table = self._order.get(torch.device("cpu"))
        if table is not None:
            return table.long()
        walk = torch.arange(self.length)
        return walk.flip(0) if self.reversed else walk

    def order(self, device: torch.device) -> Tensor | None:
        """The int32 table on `device`, or None for an affine walk."""
        return self._on(self._order, device)

    def restarts(self, device: torch.device) -> Tensor | None:
        """Which tokens restart the state, (length,) bool on `device`, or None if none does."""
        return self._on(self._restarts, device)

    @staticmethod
    def _on(tables: dict[torch.device, Tensor], device: torch.device) -> Tensor | None:
        if not tables:
            return None
        if device not in tables:
            tables[device] = tables[torch.device("cpu")].to(device)
        return tables[device]

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        kind = "permutation" if self._order else "reverse" if self.reversed else "identity"
        return f"ScanPath({kind}, length={self.length}, restarts={'yes' if self._restarts else 'no'})"
