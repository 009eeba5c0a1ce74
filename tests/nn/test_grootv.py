"""GrootVL's layer for images: its equations path by path, the tree it walks, blocks, low precision."""

import images
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load

from ssmkit.nn import GrootVLayer, TreeSSM
from ssmkit.nn.grootv import _edges_on, edges_of, likeness_tree
from ssmkit.ops import minimum_spanning_tree
from ssmkit.ops.minimum_spanning_tree import grid_edges
from ssmkit.testing import available, device_of

BACKENDS = [name for name in available("tree_scan", reference=True) if name != "triton" or torch.cuda.is_available()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = TreeSSM(**({"d_model": 6} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


def joined(tree, row):
    """The edges of one tree, each with its smaller end first."""
    order, parent = (table[row].tolist() for table in tree)
    return {tuple(sorted((order[p], order[parent[p]]))) for p in range(1, len(order))}


def test_the_official_tree():
    case = load("grid_mst")
    tree = likeness_tree(case.inputs["feature"].double().movedim(1, -1))
    for row, edges in enumerate(case.outputs["edges_cosine"].tolist()):
        assert joined(tree, row) == {tuple(edge) for edge in edges}


def test_cells_that_are_alike_or_empty_make_a_tree():
    x = torch.zeros(2, 3, 4, 5)
    x[1] = 1.0
    alike = minimum_spanning_tree(torch.zeros(1, 17), grid_edges(3, 4), 12)
    for row in range(2):
        assert joined(likeness_tree(x), row) == joined(alike, 0)


def test_edges_are_made_once_where_their_check_waits_for_the_device():
    cpu = torch.device("cpu")
    with torch.inference_mode():
        kept = _edges_on(grid_edges, (3, 4), cpu)
    assert kept is _edges_on(grid_edges, (3, 4), cpu)
    assert not kept.is_inference()
    assert torch.equal(kept, edges_of(grid_edges, 3, 4, device=cpu))


def mixed_by_hand(mixer, u):
    """The layer's equations: every pair of cells, by the path between them."""
    weights = dict(mixer.named_parameters())
    dim, rank = mixer.d_inner, mixer.dt_rank
    x, z = (u @ weights["in_proj.weight"].T).chunk(2, dim=-1)
    x = F.conv2d(x.movedim(-1, 1), weights["conv2d.weight"], padding=1, groups=dim).movedim(1, -1)
    x = F.silu(x).flatten(1, 2)
    dt, B, C = (x @ weights["x_proj_weight"][0].T).split((rank, 1, 1), dim=-1)
    dt = torch.log1p((dt @ weights["dt_projs_weight"][0].T + weights["dt_projs_bias"][0]).exp())
    a, b = torch.exp(dt * -weights["A_logs"][:, 0].exp()), dt * B * x
    edges = grid_edges(*u.shape[1:3])
    ends = x.detach()[:, edges[:, 0]].cpu(), x.detach()[:, edges[:, 1]].cpu()
    cosine = torch.stack([torch.cosine_similarity(*pair, dim=-1) for pair in zip(*ends, strict=True)])
    tree = minimum_spanning_tree((-cosine).exp(), edges, x.shape[1], backend="reference")
    rows = []
    for row in range(len(u)):
        order, parent = (table[row].tolist() for table in tree)
        above = {order[p]: order[parent[p]] for p in range(1, len(order))}

        def up(v, above=above):
            return [v, *up(above[v])] if v in above else [v]

        h = []
        for i in range(x.shape[1]):
            total = 0
            for j in range(x.shape[1]):
                apart = set(up(i)) ^ set(up(j))
                factors = [a[row, v] for v in sorted(apart)]
                total = total + b[row, j] * (torch.stack(factors).prod(0) if factors else 1)
            h.append(total)
        rows.append(torch.stack(h))
    h = F.layer_norm(torch.stack(rows), (dim,), weights["h_norm.weight"], weights["h_norm.bias"])
    y = F.layer_norm(h * C + weights["Ds"] * x, (dim,), weights["out_norm.weight"], weights["out_norm.bias"])
    return (y.unflatten(1, u.shape[1:3]) * F.silu(z)) @ weights["out_proj.weight"].T


@every_backend
@pytest.mark.parametrize("size", [(3, 5), (1, 6), (4, 1)], ids=str)
def test_equations(size, backend):
    mixer, u = layer(backend), images.image(*size, 6, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)


@every_backend
def test_gradients(backend):
    """They are those of the equations, whose tree is chosen outside of them, and reach every parameter."""
    mixer, u = layer(backend, d_model=3), images.image(2, 4, 3, backend).requires_grad_()
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=u.dtype).to(u)
    leaves = [u, *mixer.parameters()]
    actual, expected = (torch.autograd.grad(y, leaves, weight) for y in (mixer(u), mixed_by_hand(mixer, u)))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    images.check_gradients(mixer, u.detach())


def test_single_cells_and_no_images():
    mixer = layer()
    cell = images.image(1, 1, 6)
    assert torch.isfinite(mixer(cell)).all()
    assert mixer(images.image(3, 4, 6)[:0]).shape == (0, 3, 4, 6)


def test_an_official_state_dict_has_these_names():
    assert {name: tuple(tensor.shape) for name, tensor in GrootVLayer(80).state_dict().items()} == {
        "norm1.0.weight": (80,),
        "norm1.0.bias": (80,),
        "norm2.0.weight": (80,),
        "norm2.0.bias": (80,),
        "TreeSSM.in_proj.weight": (320, 80),
        "TreeSSM.conv2d.weight": (160, 1, 3, 3),
        "TreeSSM.x_proj_weight": (1, 5 + 2, 160),
        "TreeSSM.dt_projs_weight": (1, 160, 5),
        "TreeSSM.dt_projs_bias": (1, 160),
        "TreeSSM.A_logs": (160, 1),
        "TreeSSM.Ds": (160,),
        "TreeSSM.h_norm.weight": (160,),
        "TreeSSM.h_norm.bias": (160,),
        "TreeSSM.out_norm.weight": (160,),
        "TreeSSM.out_norm.bias": (160,),
        "TreeSSM.out_proj.weight": (80, 160),
        "mlp.fc1.weight": (320, 80),
        "mlp.fc1.bias": (320,),
        "mlp.fc2.weight": (80, 320),
        "mlp.fc2.bias": (80,),
    }


def test_start_values():
    mixer = TreeSSM(64, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(mixer.dt_projs_bias)
    assert 0.002 * (1 - 1e-5) <= dt.min() <= dt.max() <= 0.05 * (1 + 1e-5)
    assert mixer.dt_projs_weight.abs().max() <= 0.5
    assert not mixer.A_logs.any()
    assert all(p._no_weight_decay for p in (mixer.A_logs, mixer.Ds))


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_block_is_two_residual_branches(layer_scale):
    torch.manual_seed(0)
    block, x = images.perturbed(GrootVLayer(6, layer_scale=layer_scale)).double(), images.image(3, 5, 6)
    gammas = [1, 1] if layer_scale is None else [block.gamma1, block.gamma2]
    first = x + gammas[0] * block.TreeSSM(F.layer_norm(x, (6,), *block.norm1[0].parameters(), eps=1e-6))
    expected = first + gammas[1] * block.mlp(F.layer_norm(first, (6,), *block.norm2[0].parameters(), eps=1e-6))
    torch.testing.assert_close(block(x), expected)
    images.check_gradients(block, x)
    still = GrootVLayer(6, drop_path=1.0).double()
    assert torch.equal(still(x), x)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, backend):
    # One row, which has one tree alone: among others a rounding may choose another tree.
    low = TreeSSM(6, dtype=dtype, backend=backend)
    images.check_low_precision(layer(backend, torch.float32), low, dtype, images.image(1, 12, 6))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_compile(backend):
    images.check_compile(layer(backend, torch.float32), images.image(4, 5, 6))


BAD = {
    "d_model": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "d_state": ({"d_state": 16}, "d_state must be 1, got 16"),
    "d_conv": ({"d_conv": 2}, "d_conv must be odd, so that the image keeps its size, got 2"),
    "dt_rank": ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
    "dt_init": ({"dt_init": "zeros"}, "dt_init must be 'random' or 'constant', got 'zeros'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TreeSSM(**({"d_model": 8} | options))


def test_bad_calls():
    with pytest.raises(ValueError, match=r"x must have shape \(2, 5, 4, 6\) .*, got \(2, 5, 4, 7\)"):
        layer()(torch.zeros(2, 5, 4, 7))
