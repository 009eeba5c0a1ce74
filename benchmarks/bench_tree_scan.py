"""tree_scan: memory-bound, a and b once in and h once out at best; trees are those of images with random weights."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssmkit.ops import linear_scan, tree_scan
from ssmkit.ops._tree import Tree
from ssmkit.testing import tree_scan_inputs

from . import Bench, Prepared, Rival, register

Runs = list[tuple[Tensor, Tensor]]


def runs_of(tree: Tree) -> Runs:
    """The levels of one tree below its root: their positions, and those of the parents."""
    parent, runs, lo = tree.parent[0].long(), [], 1
    while lo < len(parent):
        hi = lo + int((parent[lo:] < lo).sum())
        runs.append((torch.arange(lo, hi), parent[lo:hi]))
        lo = hi
    return runs


def levels(a: Tensor, b: Tensor, order: Tensor, runs: Runs) -> Tensor:
    """The levels of the tree one after another, from the leaves up and down again."""
    a, b = a[:, order], b[:, order]
    begins = [0, *(int(own[0]) for own, _ in runs), b.shape[1]]
    xi = list(b.split([end - begin for begin, end in pairwise(begins)], dim=1))
    for i in reversed(range(len(runs))):
        own, above = runs[i]
        xi[i] = xi[i].index_add(1, above - begins[i], a[:, own] * xi[i + 1])
    h = [xi[0]]
    for i, (own, above) in enumerate(runs):
        h.append(xi[i + 1] + a[:, own] * (h[i][:, above - begins[i]] - a[:, own] * xi[i + 1]))
    return torch.zeros_like(b).index_copy(1, order, torch.cat(h, dim=1))


def torch_loop(inputs: dict[str, Any]) -> Prepared:
    """`levels` with the tables made beforehand."""
    tree = inputs["tree"]
    order, runs = tree.order[0].long(), runs_of(tree)
    return Prepared(lambda: levels(inputs["a"], inputs["b"], order, runs), note="tables of the levels made beforehand")


def one_tree(batch: int) -> str | None:
    """The levels of several trees do not line up."""
    return None if batch == 1 else "levels of one tree only"


def chain(a: Tensor, b: Tensor, tree: Tree) -> Tensor:
    """A scan along the sequence, of the same size."""
    h: Tensor = linear_scan(a, b)
    return h


def bytes_moved(batch: int, rows: int, cols: int, dim: int, dtype: torch.dtype, mode: str) -> int:
    """a, b and h; backward reads dh, a and xi and writes da and db."""
    return batch * rows * cols * dim * dtype.itemsize * (3 if mode == "fwd" else 8)


register(
    Bench(
        op=tree_scan,
        inputs=tree_scan_inputs,
        shapes={
            "GrootVL-S, first stage": {"batch": 1, "rows": 56, "cols": 56, "dim": 192},
            "56x56 tokens, 96 channels": {"batch": 1, "rows": 56, "cols": 56, "dim": 96},
            "GrootVL-S, third stage, 8 images": {"batch": 8, "rows": 14, "cols": 14, "dim": 768},
            "224x224 tokens, 96 channels": {"batch": 1, "rows": 224, "cols": 224, "dim": 96},
            "224x224 tokens, 192 channels": {"batch": 1, "rows": 224, "cols": 224, "dim": 192},
        },
        fixed={"requires_grad": False},
        bytes_moved=bytes_moved,
        rivals={
            "torch, level by level": Rival(prepare=torch_loop, declines=one_tree),
            "linear_scan (contrast)": Rival(call=chain, contrast=True),
        },
    )
)
