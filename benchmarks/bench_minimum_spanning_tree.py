"""minimum_spanning_tree of images with random weights: sorting, and then a walk through memory that stays in a cache."""

import importlib
from typing import Any

import torch
from torch import Tensor

from ssmkit.ops import minimum_spanning_tree
from ssmkit.testing import minimum_spanning_tree_inputs

from . import Absent, Bench, Prepared, Rival, register


def numbers(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The order of the tokens as numbers that can be compared, which is exact."""
    return {name: order.double() for name, order in results.items()}


def ours(inputs: dict[str, Any]) -> Prepared:
    """The op."""
    return Prepared(lambda: minimum_spanning_tree(**inputs), finish=numbers)


def truth(**inputs: Any) -> Tensor:
    """The reference's order."""
    return minimum_spanning_tree(**inputs, backend="reference").order.double()


def scipy_graph(inputs: dict[str, Any]) -> Prepared:
    """SciPy's Kruskal and breadth-first walk, image after image; its graph is made within the call, as ours is."""
    try:
        sparse, graph = (importlib.import_module(name) for name in ("scipy.sparse", "scipy.sparse.csgraph"))
    except ImportError as missing:
        raise Absent(f"pip install scipy ({missing})") from None
    weights, edges, seqlen = inputs["weights"].numpy(), inputs["edges"].numpy(), inputs["seqlen"]

    def call() -> Tensor:
        orders = []
        for row in weights:
            joined = sparse.csr_array((row, (edges[:, 0], edges[:, 1])), shape=(seqlen, seqlen))
            tree = graph.minimum_spanning_tree(joined)
            # both ways, so that neighbours come in ascending order
            orders.append(torch.from_numpy(graph.breadth_first_order(tree + tree.T, 0)[0]))
        return torch.stack(orders)

    return Prepared(call, finish=numbers)


def bytes_moved(batch: int, rows: int, cols: int, dtype: torch.dtype) -> int:
    """Weights and edges in, both tables out."""
    nedges = 2 * rows * cols - rows - cols
    return batch * (nedges * dtype.itemsize + 2 * rows * cols * 4) + nedges * 8


register(
    Bench(
        op=Rival(prepare=ours, modes=("fwd",)),
        name="minimum_spanning_tree",
        reference=truth,
        inputs=minimum_spanning_tree_inputs,
        shapes={
            "GrootVL, first stage": {"batch": 1, "rows": 56, "cols": 56},
            "GrootVL, third stage, 8 images": {"batch": 8, "rows": 14, "cols": 14},
            "224x224 tokens": {"batch": 1, "rows": 224, "cols": 224},
        },
        bytes_moved=bytes_moved,
        modes=("fwd",),
        rivals={"SciPy": Rival(prepare=scipy_graph, modes=("fwd",))},
    )
)
