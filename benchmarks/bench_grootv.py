"""GrootVL's whole tree-scan mixer for images against the same weights over trees of SciPy and sweeps in plain torch."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import TreeSSM
from ssmkit.nn.grootv import normed
from ssmkit.nn.mamba2d import rates
from ssmkit.ops.minimum_spanning_tree import Tree, grid_edges

from . import Absent, Bench, register
from .bench_tree_scan import levels, runs_of
from .layers import layer_inputs, loaded

# The projections add up to 2 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0
KEPT = ("A_logs", "Ds")


def grootv_inputs(
    batch: int, height: int, width: int, d_model: int, *, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Images, and the parameters of a fresh layer under their names in its state dict."""
    return layer_inputs(lambda: TreeSSM(d_model), "x", (batch, height, width, d_model), KEPT, dtype, device)


def scipy_tree(x: Tensor) -> Tree:
    """The tree of one image by SciPy, which goes over the weights on the host."""
    try:
        csgraph, sparse = (importlib.import_module(f"scipy.sparse{part}") for part in (".csgraph", ""))
    except ImportError as error:
        raise Absent("pip install scipy") from error
    height, width = x.shape[1:3]
    edges, tokens = grid_edges(height, width).long(), x.detach().flatten(1, 2)[0]
    weights = torch.cosine_similarity(tokens[edges[:, 0]], tokens[edges[:, 1]], dim=-1).neg().exp()
    graph = sparse.coo_matrix((weights.numpy(), edges.T.numpy()), shape=(height * width,) * 2).tocsr()
    order, above = csgraph.breadth_first_order(csgraph.minimum_spanning_tree(graph), 0, directed=False)
    order = torch.from_numpy(order).long()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    parent = place[torch.from_numpy(above).long()[order].clamp(min=0)]
    parent[0] = 0
    return Tree(order.int()[None], parent.int()[None])


class Plain(TreeSSM):
    """The layer over a tree of SciPy, its levels one after another in plain torch, for one image."""

    def scan(self, x: Tensor) -> Tensor:
        """As `TreeSSM.scan`."""
        tree = scipy_tree(x)
        A, tokens = rates(self.A_logs)[:, 0], x.flatten(1, 2)
        dt, B, C = F.linear(tokens, self.x_proj_weight[0]).split((self.dt_rank, 1, 1), dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_projs_weight[0]) + self.dt_projs_bias[0])
        h = levels(torch.exp(dt * A), dt * B * tokens, tree.order[0].long(), runs_of(tree))
        y = normed(self.h_norm, h) * C + self.Ds * tokens
        return normed(self.out_norm, y).unflatten(1, x.shape[1:3])


def one_image(batch: int) -> str | None:
    """The levels of several trees do not line up."""
    return None if batch == 1 else "one image only"


def reference(x: Tensor, **weights: Tensor) -> Tensor:
    """Our layer in float64 on the reference ops."""
    layer = TreeSSM(x.shape[-1], backend="reference").double()
    return functional_call(layer, weights, (x,))


def products(batch: int, height: int, width: int, d_model: int, mode: str) -> float:
    """The projections: in, out, to steps and weights, from the rank of the steps."""
    rank = -(-d_model // 16)
    return batch * height * width * 2 * d_model * (3 * d_model + 2 * rank + 2) * (1 if mode == "fwd" else 3)


def bytes_moved(batch: int, height: int, width: int, d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    rank = -(-d_model // 16)
    weights = 2 * d_model * (3 * d_model + 2 * rank + 2 + 9 + 4)
    return dtype.itemsize * (weights + 2 * batch * height * width * d_model) * (1 if mode == "fwd" else 3)


register(
    Bench(
        name="grootv",
        op=loaded(lambda inputs: TreeSSM(inputs["x"].shape[-1]), "x"),
        inputs=grootv_inputs,
        shapes={
            "GrootVL-T, first stage": {"batch": 1, "height": 56, "width": 56, "d_model": 80},
            "GrootVL-T, third stage": {"batch": 1, "height": 14, "width": 14, "d_model": 320},
        },
        bytes_moved=bytes_moved,
        products=products,
        slack=SLACK,
        parameters=tuple(name for name, _ in TreeSSM(1).named_parameters()),
        reference=reference,
        rivals={
            "SciPy, then torch level by level": loaded(
                lambda inputs: Plain(inputs["x"].shape[-1]), "x", declines=one_image
            )
        },
    )
)
