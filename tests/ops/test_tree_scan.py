"""tree_scan: every backend against the float64 reference, the official numbers, path products, and the laws of a tree."""

import pytest
import torch
from golden_cases import load, names
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same

from ssmkit.ops import linear_scan, tree_scan
from ssmkit.ops.tree_scan import BACKENDS, Tree, tree_scan_bwd, tree_scan_fwd
from ssmkit.testing import assert_close, available, device_of, run, to_double, tree_scan_inputs

SHAPES = {  # batch, rows, cols, dim
    "smallest": (1, 1, 1, 1),
    "odd everything": (3, 5, 7, 7),
    "a row": (2, 1, 19, 33),
    "wider than a block of columns": (1, 3, 4, 301),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("tree_scan"))
every_backend = pytest.mark.parametrize("backend", available("tree_scan", reference=True))
sweeps = pytest.mark.parametrize("sweeps", ["both", "up"])


def path_edges(seqlen):
    return torch.tensor([[i, i + 1] for i in range(seqlen - 1)], dtype=torch.int64).view(-1, 2)


def random_edges(seqlen, seed, reach=1000):
    """A random tree: each token but the first hangs on one of the `reach` before it, under shuffled names."""
    generator = torch.Generator().manual_seed(seed)
    name = torch.randperm(seqlen, generator=generator).tolist()
    drawn = torch.rand(seqlen, generator=generator).tolist()
    return torch.tensor(
        [[name[i], name[i - 1 - int(drawn[i] * min(i, reach))]] for i in range(1, seqlen)], dtype=torch.int64
    ).view(-1, 2)


def star_edges(seqlen):
    return torch.tensor([[0, i] for i in range(1, seqlen)], dtype=torch.int64).view(-1, 2)


def cotangents(inputs, seed=1):
    """Weights of h."""
    generator = torch.Generator().manual_seed(seed)
    return {"h": torch.randn(inputs["b"].shape, generator=generator, dtype=torch.float64).to(inputs["b"].dtype)}


def compare(inputs, backend, **options):
    """One backend against the reference in float64, outputs and all gradients."""
    weights = cotangents(inputs)
    actual = run(tree_scan, inputs, weights, backend=backend, **options)
    expected = run(tree_scan, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name])
    return actual


@backends
@sweeps
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, sweeps, backend):
    compare(tree_scan_inputs(*shape, dtype=dtype, device=device_of(backend)), backend, sweeps=sweeps)


TREES = {  # tokens, edges
    "path": (40, path_edges(40)),
    "star": (23, star_edges(23)),
    "random": (61, random_edges(61, 1)),
    "long branches": (61, random_edges(61, 2, reach=3)),
}


@backends
@sweeps
@pytest.mark.parametrize(("seqlen", "edges"), TREES.values(), ids=TREES)
def test_trees_of_all_shapes(seqlen, edges, sweeps, backend):
    compare(tree_scan_inputs(2, 1, seqlen, 9, edges=edges, device=device_of(backend)), backend, sweeps=sweeps)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("tree_scan_*"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    device = device_of(backend)
    inputs = {
        ours: case.inputs[theirs].transpose(1, 2).to(device, dtype).requires_grad_()
        for ours, theirs in (("a", "edge_weight"), ("b", "feature"))
    }
    tree = Tree(case.inputs["sorted_index"].to(device), case.inputs["sorted_parent"].to(device))
    actual = run(tree_scan, inputs | {"tree": tree}, {"h": case.cotangents["out"].transpose(1, 2)}, backend=backend)
    xi = tree_scan(inputs["a"].detach(), inputs["b"].detach(), tree, sweeps="up", backend=backend)
    actual["xi"] = xi.gather(1, tree.order.long()[..., None].expand_as(xi))
    expected = {
        "h": case.outputs["out"],
        "da": case.gradients["in.edge_weight"],
        "db": case.gradients["in.feature"],
        "xi": case.outputs["aggr_up"],
    }
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert_close(key, value, expected[key].transpose(1, 2))


# Laws


def draw(data, backend, *, edges=None, max_seqlen=20):
    """Small inputs in float64, so that a law holds to rounding, and the parents (by token) of one tree for all rows."""
    # every level of a tree costs the interpreter a round
    longest = min(max_seqlen, 7) if backend == "triton" else max_seqlen
    seqlen, seed = data.draw(st.integers(1, longest)), data.draw(st.integers(0, 2**16))
    made = random_edges(seqlen, seed, data.draw(st.sampled_from([1, 3, 1000]))) if edges is None else edges(seqlen)
    options = {"edges": made, "dtype": torch.float64, "requires_grad": False, "seed": seed}
    return tree_scan_inputs(data.draw(st.integers(1, 3)), 1, seqlen, data.draw(st.integers(1, 5)), **options)


def scan(inputs, backend, **options):
    device = device_of(backend)
    tree = Tree(*(table.to(device) for table in inputs["tree"]))
    return tree_scan(inputs["a"].to(device), inputs["b"].to(device), tree, backend=backend, **options).cpu()


def parents_of(tree, row=0):
    """The token above each token; of the root, itself."""
    order, parent = tree.order[row].tolist(), tree.parent[row].tolist()
    return {order[position]: order[parent[position]] for position in range(len(order))}


@every_backend
@law
@given(data=st.data())
def test_every_token_gathers_all_others_along_their_paths(backend, data):
    inputs = draw(data, backend, max_seqlen=12)
    a, b = inputs["a"], inputs["b"]
    above = parents_of(inputs["tree"])

    def to_root(token):
        walk = [token]
        while above[walk[-1]] != walk[-1]:
            walk.append(above[walk[-1]])
        return walk

    expected, rising = torch.zeros_like(b), torch.zeros_like(b)
    for i in above:
        for j in above:
            up, down = to_root(j), to_root(i)
            # the edges of the path are those of one way to the root and not of the other
            product = torch.ones_like(b[:, 0])
            for token in set(up) ^ set(down):
                product = product * a[:, token]
            expected[:, i] += product * b[:, j]
            if i in up:
                rising[:, i] += product * b[:, j]
    same(scan(inputs, backend), expected)
    same(scan(inputs, backend, sweeps="up"), rising)


@every_backend
@law
@given(data=st.data())
def test_a_path_is_a_chain_scanned_both_ways(backend, data):
    inputs = draw(data, backend, edges=path_edges)
    a, b = inputs["a"], inputs["b"]
    ahead = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
    forward = linear_scan(a, b, backend="reference")
    backward = linear_scan(ahead, b, reverse=True, backend="reference")
    same(scan(inputs, backend), forward + backward - b)
    same(scan(inputs, backend, sweeps="up"), backward)


@every_backend
@sweeps
@law
@given(data=st.data())
def test_the_order_of_children_does_not_matter(backend, sweeps, data):
    inputs = draw(data, backend)
    above = parents_of(inputs["tree"])
    children = {token: [t for t in above if above[t] == token and t != token] for token in above}
    order, parent = [int(inputs["tree"].order[0, 0])], [0]
    for position, token in enumerate(order):
        shuffled = data.draw(st.permutations(children[token]))
        order += shuffled
        parent += [position] * len(shuffled)
    other = Tree(torch.tensor([order], dtype=torch.int32), torch.tensor([parent], dtype=torch.int32))
    same(scan(inputs | {"tree": other}, backend, sweeps=sweeps), scan(inputs, backend, sweeps=sweeps))


@every_backend
@law
@given(data=st.data())
def test_decays_of_zero_cut_and_of_one_sum(backend, data):
    inputs = draw(data, backend)
    a, b = inputs["a"], inputs["b"]
    same(scan(inputs | {"a": torch.zeros_like(a)}, backend), b)
    same(scan(inputs | {"a": torch.ones_like(a)}, backend), b.sum(1, keepdim=True).expand_as(b))


@every_backend
@law
@given(data=st.data())
def test_the_numbers_of_the_root_s_decay_do_not_matter(backend, data):
    inputs = draw(data, backend)
    poisoned = inputs["a"].clone()
    poisoned[:, inputs["tree"].order[0, 0].long()] = torch.nan
    same(scan(inputs | {"a": poisoned}, backend), scan(inputs, backend))


@every_backend
@sweeps
def test_one_tree_serves_the_batch(sweeps, backend):
    inputs = tree_scan_inputs(3, 4, 5, 6, device=device_of(backend))
    one = Tree(*(table[1:2] for table in inputs["tree"]))
    each = Tree(*(table.expand(3, -1) for table in one))
    expected, actual = (
        run(tree_scan, inputs | {"tree": tree}, cotangents(inputs), sweeps=sweeps, backend=backend)
        for tree in (each, one)
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", [b for b in available("tree_scan", reference=True) if b != "triton"])
@sweeps
@pytest.mark.parametrize(("seqlen", "edges"), [(9, random_edges(9, 5)), (7, star_edges(7))], ids=["random", "star"])
def test_gradcheck(seqlen, edges, sweeps, backend):
    inputs = tree_scan_inputs(2, 1, seqlen, 2, edges=edges, dtype=torch.float64, device=device_of(backend))
    tree = inputs["tree"]
    assert torch.autograd.gradcheck(
        lambda a, b: tree_scan(a, b, tree, sweeps=sweeps, backend=backend), (inputs["a"], inputs["b"])
    )


# Registration


@backends
@sweeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(dtype, sweeps, backend):
    inputs = tree_scan_inputs(2, 3, 3, 4, dtype=dtype, device=device_of(backend))
    both = sweeps == "both"
    torch.library.opcheck(tree_scan_fwd, (inputs["a"], inputs["b"], *inputs["tree"], both, True, backend))
    a, b = (inputs[name].detach() for name in "ab")
    h, xi = tree_scan_fwd(a, b, *inputs["tree"], both, True, backend)
    torch.library.opcheck(tree_scan_bwd, (torch.ones_like(h), a, xi, *inputs["tree"], both, backend))


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, backend):
    def layer(a, b, tree):
        return tree_scan(a, tree_scan(a, b, tree, backend=backend), tree, sweeps="up", backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for cols in (4, 5):
        inputs = tree_scan_inputs(2, 3, cols, 6, device=device_of(backend))
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_export(backend):
    class Layer(torch.nn.Module):
        def forward(self, a, b, order, parent):
            return tree_scan(a, b, Tree(order, parent), backend=backend)

    def arguments(cols):
        inputs = tree_scan_inputs(2, 2, cols, 4, device=device_of(backend), requires_grad=False)
        return inputs["a"], inputs["b"], *inputs["tree"]

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Layer(), arguments(4), dynamic_shapes=({1: length},) * 4)
    torch.testing.assert_close(program.module()(*arguments(7)), Layer()(*arguments(7)))


# Layouts, sizes, bits


@backends
def test_views(backend):
    plain = tree_scan_inputs(2, 3, 4, 6, device=device_of(backend))
    a, b = torch.cat([plain["a"].detach(), plain["b"].detach()], dim=-1).split(6, dim=-1)
    views = {
        "slices of a projection": {"a": a, "b": b},
        "batch in the middle": {k: plain[k].detach().transpose(0, 1).contiguous().transpose(0, 1) for k in "ab"},
        "channels first": {k: plain[k].detach().transpose(1, 2).contiguous().transpose(1, 2) for k in "ab"},
        "tables by column": {"tree": Tree(*(table.T.contiguous().T for table in plain["tree"]))},
    }
    expected = run(tree_scan, plain, cotangents(plain), backend=backend)
    for label, changed in views.items():
        strided = plain | {k: v if k == "tree" else v.requires_grad_() for k, v in changed.items()}
        actual = run(tree_scan, strided, cotangents(plain), backend=backend)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), f"{label}: {name}"


@every_backend
@sweeps
@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 4), (2, 0, 2, 4), (2, 2, 2, 0)], ids=["no batch", "no tokens", "no channels"]
)
def test_empty(shape, sweeps, backend):
    inputs = tree_scan_inputs(*shape, device=device_of(backend))
    out = run(tree_scan, inputs, cotangents(inputs), sweeps=sweeps, backend=backend)
    assert all(value.shape == inputs["b"].shape for value in out.values())


@backends
@sweeps
def test_threads_and_repetition_do_not_change_the_bits(sweeps, backend):
    inputs = tree_scan_inputs(2, *((7, 9, 140) if backend == "cpu" else (3, 4, 20)), device=device_of(backend))
    runs = []
    for threads in (1, 3, 3, 40) if backend == "cpu" else (1, 1):
        torch.set_num_threads(threads)
        runs.append(run(tree_scan, inputs, cotangents(inputs), sweeps=sweeps, backend=backend))
    for other in runs[1:]:
        assert all(torch.equal(other[name], runs[0][name]) for name in other)


@backends
def test_nothing_is_kept_where_no_gradient_is_wanted(backend):
    inputs = tree_scan_inputs(2, 3, 3, 4, device=device_of(backend), requires_grad=False)
    for save in (False, True):
        _, xi = tree_scan_fwd(inputs["a"], inputs["b"], *inputs["tree"], True, save, backend)
        assert (xi.numel() > 0) == save


# Refusals


def good():
    return tree_scan_inputs(2, 2, 3, 4, requires_grad=False)


def tables(order=(0, 1, 2, 3, 4, 5), parent=(0, 0, 0, 1, 1, 3)):
    return {"tree": Tree(*(torch.tensor([table] * 2, dtype=torch.int32) for table in (order, parent)))}


BAD = {
    "b not three axes": ({"b": torch.zeros(2, 6)}, r"b must have shape \(batch, seqlen, dim\), got \(2, 6\)"),
    "b of integers": ({"b": torch.zeros(2, 6, 4, dtype=torch.int64)}, "b must be of dtype float32"),
    "b complex": ({"b": torch.zeros(2, 6, 4).cfloat()}, "b must be of dtype float32"),
    "a too short": ({"a": torch.zeros(2, 5, 4)}, r"a must have shape \(2, 6, 4\).*got \(2, 5, 4\)"),
    "a of another dtype": ({"a": torch.zeros(2, 6, 4).half()}, "a must be of dtype float32 like b, got float16"),
    "a elsewhere": ({"a": torch.zeros(2, 6, 4, device="meta")}, "a must be on cpu like b, got meta"),
    "tables of another length": (tables((0,), (0,)), r"tree.order must have shape \(2, 6\) \(batch or 1, seqlen\)"),
    "tables of three": (
        {"tree": Tree(*torch.zeros(2, 3, 6, dtype=torch.int32))},
        r"tree.order must have shape \(2, 6\) \(batch or 1, seqlen\), got \(3, 6\)",
    ),
    "tables that differ": (
        {"tree": Tree(tables()["tree"].order, tables()["tree"].parent[:1])},
        r"tree.parent must have shape \(2, 6\) \(like tree.order\), got \(1, 6\)",
    ),
    "tables of int64": ({"tree": Tree(*(t.long() for t in tables()["tree"]))}, "tree.order must be of dtype int32"),
    "a token twice": (tables(order=(0, 1, 1, 3, 4, 5)), r"tree.order must hold each token of 0\.\.5 once; row 0"),
    "a token beyond": (tables(order=(0, 1, 2, 3, 4, 6)), r"tree.order must hold each token of 0\.\.5 once; row 0"),
    "a token below": (tables(order=(-1, 1, 2, 3, 4, 5)), r"tree.order must hold each token of 0\.\.5 once; row 0"),
    "a parent behind": (tables(parent=(0, 0, 0, 3, 3, 3)), "tree.parent must lie before its child; row 0"),
    "not breadth first": (tables(parent=(0, 0, 1, 0, 1, 1)), "tree.parent must start with 0 and never descend"),
    "no root": (tables(parent=(1, 1, 1, 1, 1, 1)), "tree.parent must start with 0 and never descend"),
    "a sweep of another name": ({"sweeps": "down"}, "sweeps must be 'both' or 'up', got 'down'"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu; got 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        tree_scan(**(good() | change))


def test_a_tree_written_to_is_checked_again():
    inputs = good()
    tree_scan(**inputs)
    inputs["tree"].parent[:, 1] = 5
    with pytest.raises(ValueError, match=r"tree\.parent must"):
        tree_scan(**inputs)


def test_a_backend_asked_for_by_name_never_falls_back():
    elsewhere = {k: Tree(*(t.to("meta") for t in v)) if k == "tree" else v.to("meta") for k, v in good().items()}
    for row in BACKENDS:
        with pytest.raises(NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: "):
            tree_scan(**elsewhere, backend=row.name)
