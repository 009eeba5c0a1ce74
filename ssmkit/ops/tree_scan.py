"""Tree scan: a first-order recurrence per channel over a tree in place of a sequence.

    xi_v = b_v + sum over children c of v:  a_c xi_c                  leaves to root (1)
    h_root = xi_root,  h_v = (1 - a_v^2) xi_v + a_v h_parent(v)       root to leaves (2)

After both sweeps h_i is the sum over all tokens j of b_j times the product of a over the edges of the path from j to i,
an edge bearing the a of its lower end. GrootVL (Xiao et al. 2024, "MambaTree", arXiv:2406.02395) with a = exp(dt A) and
b = dt B x; its form for text is the first sweep alone. The gradient of the paper's listing does not hold when read
literally: it takes a token's own h where the parent's belongs.
"""

from typing import Any

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_ndim, check_shape, check_sizes
from ssmkit.ops._define import acc_dtype, define, flat_rows
from ssmkit.ops._tree import Tree, check_tables

__all__ = ["BACKENDS", "Tree", "tree_scan"]

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.tree_scan_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.tree_scan"),
    Backend("cpu", device="cpu", module="ssmkit.native.tree_scan"),
)
SWEEPS = ("both", "up")


def tree_scan(a: Tensor, b: Tensor, tree: Tree, *, sweeps: str = "both", backend: str = "auto") -> Tensor:
    """Linear recurrence over the trees of a batch, for each channel by itself.

        xi_v = b_v + sum over children c of v:  a_c xi_c                  leaves to root (1)
        h_root = xi_root,  h_v = (1 - a_v^2) xi_v + a_v h_parent(v)       root to leaves (2)

    h_i is the sum over all tokens j of b_j times the product of a along the path from j to i. GrootVL, arXiv:2406.02395.

    Args:
        a: Decays; a_v is that of the edge from v to its parent, the root's is not read   (batch, seqlen, dim)  as b
        b: Inputs                                  (batch, seqlen, dim)  fp32, bf16, fp16 or fp64
        tree: order and parent, as `minimum_spanning_tree` returns them   (batch, seqlen) or (1, seqlen)  int32
        sweeps: "both"; or "up" for (1) alone, whose result is xi: what reaches each token from the tokens below it.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        h of the shape and dtype of b. Both sweeps run in fp32 (fp64 for fp64).
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(a, b, tree, sweeps)
    chosen = choose("tree_scan", BACKENDS, backend, b)
    both = sweeps == "both"
    if chosen == "reference" or b.device.type != "cpu":
        check_tables(tree)
    if chosen == "reference":
        return tree_scan_ref(a, b, tree, both)
    save = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    h, _ = tree_scan_fwd(a, b, tree.order, tree.parent, both, save, chosen)
    return h


def check(a: Tensor, b: Tensor, tree: Tree, sweeps: str) -> None:
    """Refuse what no backend may see. What stands in the tables is checked where they are about to be followed."""
    check_ndim("b", b, "batch, seqlen, dim")
    check_dtype("b", b, FLOATS)
    check_sizes(b, "b")
    check_shape("a", a, b.shape, "batch, seqlen, dim")
    check_dtype("a", a, (b.dtype,), "like b")
    batch, seqlen, _ = b.shape
    order, parent = tree
    check_ndim("tree.order", order, "batch, seqlen")
    check_shape("tree.order", order, (batch if order.shape[0] != 1 else 1, seqlen), "batch or 1, seqlen")
    check_shape("tree.parent", parent, order.shape, "like tree.order")
    check_device(b, "b", a=a, **{"tree.order": order, "tree.parent": parent})
    for name, table in (("tree.order", order), ("tree.parent", parent)):
        check_dtype(name, table, (torch.int32,))
    if sweeps not in SWEEPS:
        raise ValueError(f"sweeps must be 'both' or 'up', got {sweeps!r}")


def tree_scan_ref(a: Tensor, b: Tensor, tree: Tree, both: bool) -> Tensor:
    """Equations (1) and (2), one token at a time, in float64."""
    batch, seqlen, _ = b.shape
    rows = []
    for sample in range(batch):
        order, parent = (table.expand(batch, -1)[sample].tolist() for table in tree)
        a_V, xi_V = (list(t[sample].double().unbind(0)) for t in (a, b))
        for position in reversed(range(1, seqlen)):
            v, above = order[position], order[parent[position]]
            xi_V[above] = xi_V[above] + a_V[v] * xi_V[v]  # (1)
        h_V = list(xi_V)
        for position in range(1, seqlen) if both else ():
            v, above = order[position], order[parent[position]]
            h_V[v] = (1 - a_V[v] ** 2) * xi_V[v] + a_V[v] * h_V[above]  # (2)
        rows.append(torch.stack(h_V) if h_V else b[sample].double())
    return (torch.stack(rows) if rows else b.double()).to(b.dtype)


def _forward(
    a: Tensor, b: Tensor, order: Tensor, parent: Tensor, both: bool, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if b.device.type == "cpu":
        # here and not before, so that compiled graphs do it too
        check_tables(Tree(order, parent))
    tables = order.contiguous(), parent.contiguous()
    return load(BACKENDS, backend).forward(flat_rows(a), flat_rows(b), *tables, both, save)


def _forward_fake(
    a: Tensor, b: Tensor, order: Tensor, parent: Tensor, both: bool, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), b.new_empty(b.shape if save else (0,), dtype=acc_dtype(b.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, order, parent, both, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = tree_scan_fwd(*inputs[:5], True, backend)
    # xi, by position in the tree and not rounded: h is made of it again
    ctx.save_for_backward(a, output[1], order, parent)
    ctx.options = (both, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dh is None:
        return (None,) * 7
    da, db = tree_scan_bwd(dh, *ctx.saved_tensors, *ctx.options)
    return da, db, *[None] * 5


def _backward(
    dh: Tensor, a: Tensor, xi: Tensor, order: Tensor, parent: Tensor, both: bool, backend: str
) -> tuple[Tensor, Tensor]:
    tables = order.contiguous(), parent.contiguous()
    return load(BACKENDS, backend).backward(flat_rows(dh), flat_rows(a), xi.contiguous(), *tables, both)


def _backward_fake(
    dh: Tensor, a: Tensor, xi: Tensor, order: Tensor, parent: Tensor, both: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), dh.new_empty(dh.shape)


tree_scan_bwd = define(
    "tree_scan_bwd(Tensor dh, Tensor a, Tensor xi, Tensor order, Tensor parent, bool both, str backend) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
tree_scan_fwd = define(
    "tree_scan_fwd(Tensor a, Tensor b, Tensor order, Tensor parent, bool both, bool save, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
