"""minimum_spanning_tree: every backend gives the very tables of the reference, and that the tree of least weight."""

from itertools import pairwise

import pytest
import torch
from golden_cases import load
from hypothesis import given
from hypothesis import strategies as st
from laws import law

from ssmkit.ops import minimum_spanning_tree, tree_scan
from ssmkit.ops._tree import check_tables
from ssmkit.ops.minimum_spanning_tree import BACKENDS, Tree, grid_edges, minimum_spanning_tree_op
from ssmkit.testing import available, device_of, minimum_spanning_tree_inputs

SIZES = {
    "one token": (1, 1, 1),
    "a row": (2, 1, 9),
    "a column": (2, 7, 1),
    "odd everything": (3, 7, 11),
    "more than a digit of edges": (1, 40, 37),
}
backends = pytest.mark.parametrize("backend", available("minimum_spanning_tree"))
every_backend = pytest.mark.parametrize("backend", available("minimum_spanning_tree", reference=True))


def on(inputs, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def span(inputs, backend, **options):
    tree = minimum_spanning_tree(**on(inputs, device_of(backend)), backend=backend, **options)
    check_tables(Tree(*(table.clone() for table in tree)))
    return Tree(*(table.cpu() for table in tree))


def tree_edges(tree, row):
    """The pairs of tokens that the tables of one row join, lower token first, sorted."""
    order, parent = tree.order[row].tolist(), tree.parent[row].tolist()
    return sorted(sorted((order[position], order[parent[position]])) for position in range(1, len(order)))


def cycle_property(weights, edges, chosen):
    """Every edge outside the tree comes after all those of the path that it would close. Edges compare by (weight, index)."""
    inside = {tuple(pair) for pair in chosen}
    ranked = {}
    for index, (pair, weight) in enumerate(zip(edges, weights, strict=True)):
        ranked.setdefault(tuple(sorted(pair)), []).append((weight, index))
    near = {}
    for u, v in inside:
        near.setdefault(u, []).append(v)
        near.setdefault(v, []).append(u)

    def heaviest(start, end):
        pending = [(start, None, (float("-inf"), -1))]
        while pending:
            token, before, worst = pending.pop()
            if token == end:
                return worst
            for other in near.get(token, ()):
                if other != before:
                    pending.append((other, token, max(worst, min(ranked[tuple(sorted((token, other)))]))))
        raise AssertionError("the tree does not join all tokens")

    return all(rank >= heaviest(*pair) for pair, ranks in ranked.items() if pair[0] != pair[1] for rank in ranks)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_tables_are_those_of_the_reference(size, dtype, backend):
    inputs = minimum_spanning_tree_inputs(*size, dtype=dtype)
    expected, actual = (span(inputs, name) for name in ("reference", backend))
    assert torch.equal(actual.order, expected.order)
    assert torch.equal(actual.parent, expected.parent)


@every_backend
@pytest.mark.parametrize("kind", ["edges_cosine", "edges_cosine_max", "edges_norm2"])
def test_official_trees(kind, backend):
    case = load("grid_mst")
    image = case.inputs["feature"].double()
    batch, _, rows, cols = image.shape
    edges = grid_edges(rows, cols)
    x = image.flatten(2).transpose(1, 2)
    first, second = (x[:, edges[:, end].long()] for end in (0, 1))
    likeness = torch.cosine_similarity(first, second, dim=2)
    weights = {
        "edges_cosine": (-likeness).exp(),
        "edges_cosine_max": likeness.exp(),
        "edges_norm2": (first - second).square().sum(2).exp(),
    }[kind]
    tree = span({"weights": weights, "edges": edges, "seqlen": rows * cols}, backend)
    for row in range(batch):
        assert tree_edges(tree, row) == case.outputs[kind][row].tolist()


@every_backend
@law
@given(data=st.data())
def test_no_edge_outside_is_less_than_the_path_it_closes(backend, data):
    rows, cols, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**16))
    inputs = minimum_spanning_tree_inputs(1, rows, cols, seed=seed)
    # few values, so that many weights are equal
    inputs["weights"] = (inputs["weights"] * data.draw(st.sampled_from([1.0, 3.0, 1000.0]))).floor() - 1
    root = data.draw(st.integers(0, rows * cols - 1))
    tree = span(inputs, backend, root=root)
    chosen = tree_edges(tree, 0)
    assert tree.order[0, 0] == root
    assert len({tuple(pair) for pair in chosen}) == rows * cols - 1
    assert cycle_property(inputs["weights"][0].tolist(), inputs["edges"].tolist(), chosen)


@every_backend
def test_equal_weights_go_by_the_index_of_the_edge(backend):
    edges = grid_edges(4, 5)
    for weights in (torch.zeros(1, len(edges)), torch.full((1, len(edges)), float("nan")), -torch.zeros(1, len(edges))):
        weights[0, ::2] *= -1
        chosen = tree_edges(span({"weights": weights, "edges": edges, "seqlen": 20}, backend), 0)
        # all vertical pairs come first, then those along the first row
        columns = [[token, token + 5] for token in range(15)]
        assert chosen == sorted(columns + [[c, c + 1] for c in range(4)])


@every_backend
def test_signs_infinities_and_nan_have_their_order(backend):
    values = [float("nan"), float("inf"), 2.0, 1e-40, 0.0, -1e-40, -3.0, float("-inf")]
    token = torch.tensor([[0, 1]] * len(values), dtype=torch.int64)
    for length in range(2, len(values) + 1):
        # parallel edges 0-1, and one other token on the one edge of least weight
        edges = torch.cat([token[:length], torch.tensor([[1, 2]])])
        weights = torch.tensor([[*values[:length], 0.5]])
        assert tree_edges(span({"weights": weights, "edges": edges, "seqlen": 3}, backend), 0) == [[0, 1], [1, 2]]
    ring = torch.tensor([[i, (i + 1) % len(values)] for i in range(len(values))])
    for place in range(len(values)):
        rolled = values[place:] + values[:place]
        chosen = tree_edges(span({"weights": torch.tensor([rolled]), "edges": ring, "seqlen": len(values)}, backend), 0)
        left_out = sorted(ring[rolled.index(values[0])].tolist())
        assert left_out not in chosen
        assert len(chosen) == len(values) - 1


@every_backend
def test_edges_of_a_text_and_loops(backend):
    pairs = [[i, i + reach] for reach in (1, 2, 3) for i in range(30 - reach)] + [[4, 4]]
    edges = torch.tensor(pairs)
    weights = torch.rand(2, len(pairs), generator=torch.Generator().manual_seed(3))
    weights[:, -1] = -1.0
    tree = span({"weights": weights, "edges": edges, "seqlen": 30}, backend, root=29)
    for row in range(2):
        assert cycle_property(weights[row].tolist(), pairs, tree_edges(tree, row))


@every_backend
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 4), (2, 0)], ids=["no batch", "no tokens"])
def test_empty(batch, seqlen, backend):
    edges = torch.tensor([[i, i + 1] for i in range(seqlen - 1)], dtype=torch.int64).view(-1, 2)
    tree = span({"weights": torch.zeros(batch, len(edges)), "edges": edges, "seqlen": seqlen}, backend)
    assert [table.shape for table in tree] == [(batch, seqlen)] * 2
    assert [table.dtype for table in tree] == [torch.int32] * 2


@backends
def test_rows_shared_by_threads_and_views(backend):
    inputs = minimum_spanning_tree_inputs(5, 6, 7)
    expected = span(inputs, backend)
    torch.set_num_threads(3)
    wide = torch.stack([inputs["weights"], inputs["weights"]], dim=-1)
    actual = span(inputs | {"weights": wide[..., 0]}, backend)
    assert torch.equal(actual.order, expected.order)
    assert torch.equal(actual.parent, expected.parent)


def test_edges_of_a_grid():
    assert grid_edges(2, 3).tolist() == [[0, 3], [1, 4], [2, 5], [0, 1], [1, 2], [3, 4], [4, 5]]
    assert grid_edges(1, 4).tolist() == [list(pair) for pair in pairwise(range(4))]
    assert grid_edges(0, 4).shape == grid_edges(1, 1).shape == (0, 2)


@backends
def test_opcheck(backend):
    inputs = on(minimum_spanning_tree_inputs(2, 3, 4), device_of(backend))
    torch.library.opcheck(minimum_spanning_tree_op, (inputs["weights"], inputs["edges"], 12, 0, backend))


@backends
def test_compile_fullgraph(backend):
    def layer(x, a, edges):
        first, second = (x[:, edges[:, end]] for end in (0, 1))
        weights = (-torch.cosine_similarity(first, second, dim=2)).exp()
        return tree_scan(a, x, minimum_spanning_tree(weights, edges, x.shape[1], backend=backend))

    device = device_of(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows, cols in ((3, 4), (4, 5)):
        generator = torch.Generator().manual_seed(rows)
        x, a = (torch.rand(2, rows * cols, 3, generator=generator).to(device).requires_grad_() for _ in range(2))
        edges = grid_edges(rows, cols, device).long()
        actual, expected = (torch.autograd.grad(f(x, a, edges).square().sum(), (x, a)) for f in (compiled, layer))
        torch.testing.assert_close(actual, expected)


def good():
    return minimum_spanning_tree_inputs(2, 2, 3)


BAD = {
    "weights of one row": ({"weights": torch.zeros(7)}, r"weights must have shape \(batch, nedges\), got \(7,\)"),
    "weights of integers": ({"weights": torch.zeros(2, 7, dtype=torch.int32)}, "weights must be of dtype float32"),
    "edges too few": ({"edges": torch.zeros(6, 2, dtype=torch.int32)}, r"edges must have shape \(7, 2\)"),
    "edges of floats": ({"edges": torch.zeros(7, 2)}, "edges must be of dtype int32, int64"),
    "edges elsewhere": ({"edges": torch.zeros(7, 2, dtype=torch.int32, device="meta")}, "edges must be on cpu"),
    "edges beyond": ({"edges": grid_edges(2, 3) + 1}, r"edges must join tokens of 0\.\.5, got 6"),
    "edges below": ({"edges": grid_edges(2, 3) - 1}, r"edges must join tokens of 0\.\.5, got -1"),
    "tokens left alone": ({"seqlen": 8}, "edges must join all 8 tokens, but they leave 3 parts; add edges"),
    "root beyond": ({"root": 6}, r"root must be a token of 0\.\.5, got 6"),
    "negative length": ({"seqlen": -1}, "seqlen must be in 0.*got -1"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu; got 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        minimum_spanning_tree(**(good() | change))


@every_backend
def test_every_backend_says_that_parts_are_not_joined(backend):
    inputs = on(good() | {"seqlen": 7}, device_of(backend))
    with pytest.raises(ValueError, match="edges must join all 7 tokens, but they leave 2 parts"):
        minimum_spanning_tree(**inputs, backend=backend)


def test_a_backend_asked_for_by_name_never_falls_back():
    elsewhere = on(good(), "meta")
    for row in BACKENDS:
        with pytest.raises(NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: "):
            minimum_spanning_tree(**elsewhere, backend=row.name)
