"""Minimum spanning trees, as `tree_scan` walks them.

    T = the spanning tree of least sum over its edges of weight_e;  between equal weights the earlier edge counts as less

GrootVL (Xiao et al. 2024, "MambaTree", arXiv:2406.02395) spans the pixels of an image by the likeness of neighbours and
the tokens of a text by that of the few before them. With the order of edges as the tie-break the tree is unique.
"""

import math

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_ndim, check_shape, check_sizes
from ssmkit.ops._define import define
from ssmkit.ops._tree import Tree, grid_edges, mark_checked

__all__ = ["BACKENDS", "Tree", "grid_edges", "minimum_spanning_tree"]

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.minimum_spanning_tree_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.minimum_spanning_tree"),
    Backend("cpu", device="cpu", module="ssmkit.native.minimum_spanning_tree"),
)


def minimum_spanning_tree(weights: Tensor, edges: Tensor, seqlen: int, *, root: int = 0, backend: str = "auto") -> Tree:
    """The minimum spanning tree of a graph over the tokens, for each row of weights by itself.

        T = the spanning tree of least sum over its edges of weight_e

    Between equal weights the earlier edge counts as less; a NaN is greater than any number. So the tree is unique, and
    so are the tables, in which children of one parent stand in ascending order of their tokens. GrootVL,
    arXiv:2406.02395. No gradient flows through the choice of a tree.

    Args:
        weights: One per edge                (batch, nedges)  fp32, bf16, fp16 or fp64
        edges: The tokens that each joins    (nedges, 2)      int32 or int64; `grid_edges` gives those of an image
        seqlen: Number of tokens; all of them must be joined.
        root: The token that the walk starts from.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        Tree(order, parent), two tables (batch, seqlen) in int32 on the device of weights, for `tree_scan`.
    Raises:
        ValueError: a shape, dtype, device or value does not fit, or the edges do not join all tokens.
        BackendError: the backend asked for cannot take the call.
    """
    check(weights, edges, seqlen, root)
    weights = weights.detach()
    chosen = choose("minimum_spanning_tree", BACKENDS, backend, weights)
    if chosen == "reference":
        check_ends(edges, seqlen)
        return minimum_spanning_tree_ref(weights, edges, seqlen, root)
    if chosen != "cpu":
        check_joined(edges, seqlen)
    tree = Tree(*minimum_spanning_tree_op(weights, edges, seqlen, root, chosen))
    return tree if torch.compiler.is_compiling() else mark_checked(tree)


def check(weights: Tensor, edges: Tensor, seqlen: int, root: int) -> None:
    """Refuse what no backend may see. Which tokens the edges join is checked where they are about to be followed."""
    check_ndim("weights", weights, "batch, nedges")
    check_dtype("weights", weights, FLOATS)
    check_sizes(weights, "weights")
    check_shape("edges", edges, (weights.shape[1], 2), "nedges, 2")
    check_dtype("edges", edges, (torch.int32, torch.int64))
    check_device(weights, "weights", edges=edges)
    if not 0 <= seqlen < 2**31:
        raise ValueError(f"seqlen must be in 0..2**31 - 1, got {seqlen}")
    if not 0 <= root < max(seqlen, 1):
        raise ValueError(f"root must be a token of 0..{seqlen - 1}, got {root}")


def check_ends(edges: Tensor, seqlen: int) -> None:
    """The edges must join tokens that there are."""
    if edges.numel() > 0:
        least, most = (int(value) for value in torch.aminmax(edges))
        if least < 0 or most >= seqlen:
            raise ValueError(f"edges must join tokens of 0..{seqlen - 1}, got {most if most >= seqlen else least}")


def check_joined(edges: Tensor, seqlen: int) -> None:
    """For kernels that cannot report what they meet: all tokens must be joined. Edges on a GPU are waited for once."""
    if torch.compiler.is_compiling() or edges.is_meta:
        return
    remembers = edges.device.type != "cpu" and not edges.is_inference()
    if remembers and getattr(edges, "_ssmkit_checked", None) == (edges._version, seqlen):
        return
    check_ends(edges, seqlen)
    spanning_edges([0.0] * len(edges), edges.tolist(), seqlen)
    if remembers:
        edges._ssmkit_checked = (edges._version, seqlen)  # type: ignore[attr-defined]


def spanning_edges(weights: list[float], edges: list[list[int]], seqlen: int) -> list[int]:
    """Indices of the tree's edges by Kruskal's rule: the least edge that joins two parts, until there is one."""
    part = list(range(seqlen))

    def part_of(token: int) -> int:
        while part[token] != token:
            part[token] = token = part[part[token]]
        return token

    chosen = []
    for edge in sorted(
        range(len(edges)), key=lambda e: (math.isnan(weights[e]), 0.0 if math.isnan(weights[e]) else weights[e], e)
    ):
        first, second = (part_of(token) for token in edges[edge])
        if first != second:
            part[second] = first
            chosen.append(edge)
    if len(chosen) < seqlen - 1:
        raise unjoined(seqlen, seqlen - len(chosen))
    return chosen


def unjoined(seqlen: int, parts: int) -> ValueError:
    """The error of a graph in several parts."""
    return ValueError(
        f"edges must join all {seqlen} tokens, but they leave {parts} parts; add edges, or scan each part by itself"
    )


def minimum_spanning_tree_ref(weights: Tensor, edges: Tensor, seqlen: int, root: int) -> Tree:
    """Kruskal's rule, then a breadth-first walk from the root."""
    pairs, tables = edges.tolist(), []
    for row in weights.double().tolist():
        neighbours: list[list[int]] = [[] for _ in range(seqlen)]
        for edge in spanning_edges(row, pairs, seqlen):
            first, second = pairs[edge]
            neighbours[first].append(second)
            neighbours[second].append(first)
        order, parent = [root][:seqlen], [0][:seqlen]
        for position, token in enumerate(order):
            above = order[parent[position]]
            children = sorted(other for other in neighbours[token] if position == 0 or other != above)
            order += children
            parent += [position] * len(children)
        tables.append([order, parent])
    both = torch.tensor(tables, dtype=torch.int32, device=weights.device).view(len(weights), 2, seqlen)
    return Tree(both[:, 0].contiguous(), both[:, 1].contiguous())


def _span(weights: Tensor, edges: Tensor, seqlen: int, root: int, backend: str) -> tuple[Tensor, Tensor]:
    if edges.device.type == "cpu":
        check_ends(edges, seqlen)
    wide = weights.dtype if weights.dtype == torch.float64 else torch.float32
    parts, *tables = load(BACKENDS, backend).forward(
        weights.to(wide).contiguous(), edges.to(torch.int32).contiguous(), seqlen, root
    )
    if parts > 1:
        raise unjoined(seqlen, parts)
    return tables[0], tables[1]


def _span_fake(weights: Tensor, edges: Tensor, seqlen: int, root: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (weights.shape[0], seqlen)
    return weights.new_empty(shape, dtype=torch.int32), weights.new_empty(shape, dtype=torch.int32)


minimum_spanning_tree_op = define(
    "minimum_spanning_tree(Tensor weights, Tensor edges, SymInt seqlen, int root, str backend) -> (Tensor, Tensor)",
    _span,
    _span_fake,
)
