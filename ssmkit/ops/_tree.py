"""Trees over the tokens of a sequence: their tables, the check of them, and the edges of graphs to span."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tree(NamedTuple):
    """A rooted tree over the tokens of each row of a batch, in breadth-first order.

    Position 0 is the root, a parent stands before its children, and the children of an earlier parent stand before those
    of a later one; among the children of one parent any order will do. One row may serve a whole batch.
    """

    order: Tensor  # (batch, seqlen) int32: the token at each position
    parent: Tensor  # (batch, seqlen) int32: the position of its parent; of the root, 0


def grid_edges(rows: int, cols: int, device: torch.device | str | None = None) -> Tensor:
    """Pairs of neighbours among rows x cols tokens in row-major order, (nedges, 2) int32: vertical ones, then horizontal.

    The order, which decides between equal weights, is that of GrootVL (arXiv:2406.02395).
    """
    token = torch.arange(rows * cols, dtype=torch.int32, device=device).view(rows, cols)
    pairs = ((token[:-1], token[1:]), (token[:, :-1], token[:, 1:]))
    return torch.cat([torch.stack((first.flatten(), second.flatten()), dim=1) for first, second in pairs])


def mark_checked(tree: Tree) -> Tree:
    """Note on a tree that was made here that it needs no check for as long as nobody writes to it."""
    if not tree.parent.is_inference():
        tree.parent._ssmkit_checked = (tree.order, tree.order._version, tree.parent._version)  # type: ignore[attr-defined]
    return tree


def is_checked(tree: Tree) -> bool:
    """Whether this very tree was checked and not written to since."""
    if tree.parent.is_inference() or tree.order.is_inference():
        return False
    order, *versions = getattr(tree.parent, "_ssmkit_checked", (None,))
    return order is tree.order and versions == [tree.order._version, tree.parent._version]


def check_tables(tree: Tree) -> None:
    """Refuse tables that are no tree in breadth-first order. Those on a GPU, which have to be waited for, are read once."""
    if (
        torch.compiler.is_compiling()
        or tree.parent.device.type == "meta"
        or tree.parent.numel() == 0
        or is_checked(tree)
    ):
        return
    order, parent = tree.order, tree.parent
    seqlen = order.shape[1]
    positions = torch.arange(seqlen, dtype=torch.int32, device=order.device)
    descends = ((parent[:, 1:] < parent[:, :-1]).any(dim=1)) | (parent[:, 0] != 0)
    ahead = (parent[:, 1:] >= positions[1:]).any(dim=1)
    seen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    missed = ~seen.scatter_(1, order.clamp(0, seqlen - 1).long(), True).all(dim=1)
    missed |= ((order < 0) | (order >= seqlen)).any(dim=1)
    problems = torch.stack((descends, ahead, missed))
    if bool(problems.any()):
        told = (
            "parent must start with 0 and never descend (the children of an earlier parent stand first)",
            "parent must lie before its child",
            f"order must hold each token of 0..{seqlen - 1} once",
        )
        kind, row = problems.nonzero()[0].tolist()
        table = tree.order if kind == 2 else tree.parent
        raise ValueError(
            f"tree.{told[kind]}; row {row} of it does not: {table[row].tolist()[:16]}{' ...' * (seqlen > 16)}; "
            "minimum_spanning_tree returns such tables"
        )
    if order.device.type != "cpu":
        # Memory of the CPU may be shared with NumPy, which leaves no trace.
        mark_checked(tree)
