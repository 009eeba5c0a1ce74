"""MHS-VM's multi-head scan: its equations route by route, the fusion of routes, names, compilation."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import GFU, MHSM, MHSBlock, VSSGate
from ssmkit.nn.mhs_vm import HEADS, ScanHead
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_number_of_heads = pytest.mark.parametrize("head_num", [3, 4])
SMALL = {"d_model": 8, "d_state": 2, "gfu_t": 0.3}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return images.perturbed(VSSGate(**(SMALL | options), backend=backend)).to(device_of(backend), dtype)


def routes(pattern, height, width):
    """Tokens of the four routes of a head, place by place as published."""
    grid = torch.arange(height * width).view(height, width)
    rows, columns = list(grid), list(grid.T)
    if pattern == "C":
        snakes = [[line.flip(0) if i % 2 else line for i, line in enumerate(lines)] for lines in (rows, columns)]
        first, second = (torch.cat(snake) for snake in snakes)
    elif pattern == "X":
        # Upwards on the even diagonals: each is read from its lower left end.
        both = []
        for view in (grid, grid.flip(1)):
            lines = [view.flip(0).diagonal(k - height + 1) for k in range(height + width - 1)]
            both.append(torch.cat([line.flip(0) if k % 2 else line for k, line in enumerate(lines)]))
        first, second = both
    elif pattern == "S":
        both = []
        for view in (grid, grid.flip(0)):
            walked = []
            while view.numel():
                walked.append(view[0])
                view = view[1:].rot90()  # what is left, turned so that the next side is on top
            both.append(torch.cat(walked))
        first, second = both
    else:
        first, second = torch.cat(rows), torch.cat(columns)
    return [first, first.flip(0), second, second.flip(0)]


def fused(ys, t):
    """Over the routes, the last axis but one."""
    mean = ys.mean(-2, keepdim=True)
    std = ((ys - mean) ** 2).sum(-2).div(ys.shape[-2] - 1).sqrt()
    variation = std / ((ys - ys.amin(-2, keepdim=True)).mean(-2) + 1e-5)
    return ys.sum(-2) * (variation - t).clamp(min=0)


def head_by_hand(head, x):
    engine, tokens, ys = head.mambaeng, x.flatten(1, 2), []
    dim, states = x.shape[3], engine.A_logs.shape[1]
    for k, order in enumerate(routes(head.pattern, *x.shape[1:3])):
        u = tokens[:, order]
        low, B, C = (u @ engine.x_proj_weight[k].T).split([1, states, states], dim=2)
        dt = torch.log1p(torch.exp(low @ engine.dt_projs_weight[k].T + engine.dt_projs_bias[k]))
        A, D = -engine.A_logs.view(4, dim, -1)[k].exp(), engine.Ds.view(4, -1)[k]
        h, y = x.new_zeros(x.shape[0], dim, states), torch.zeros_like(u)
        for p, token in enumerate(order):
            h = torch.exp(dt[:, p, :, None] * A) * h + (dt[:, p] * u[:, p])[:, :, None] * B[:, p, None]
            y[:, token] = (h * C[:, p, None]).sum(-1) + D * u[:, p]
        ys.append(y)
    return fused(torch.stack(ys, dim=2), head.esfusion.t).view_as(x)


def mixed_by_hand(mixer, u):
    x, z = mixer.in_proj(u).chunk(2, dim=3)
    x = F.silu(mixer.conv2d(x.movedim(3, 1))).movedim(1, 3)
    heads = [getattr(mixer.mhs, f"scanhead_{pattern}") for pattern in "CXSZ"[: mixer.mhs.head_num]]
    parts = (x @ mixer.mhs.x_ssproj_W.T).chunk(mixer.mhs.head_num, dim=3)
    y = torch.cat([head_by_hand(head, part) for head, part in zip(heads, parts, strict=True)], dim=3)
    return mixer.out_norm(mixer.mhs.y_proj(mixer.mhs.cat_norm(y))) * F.silu(z)


@pytest.mark.parametrize("pattern", HEADS)
@pytest.mark.parametrize("size", [(3, 5), (4, 4), (5, 2), (1, 4), (3, 1)], ids=str)
def test_routes(pattern, size):
    for path, order in zip(HEADS[pattern](*size), routes(pattern, *size), strict=True):
        assert torch.equal(path.tokens(), order)


@every_backend
@every_number_of_heads
@pytest.mark.parametrize("size", [(3, 5), (4, 3), (1, 1)], ids=str)
def test_equations(size, head_num, backend):
    mixer, u = layer(backend, head_num=head_num), images.image(*size, 8, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0]).shape == u[:0].shape


def test_routes_that_agree_count_for_nothing():
    ys = torch.randn(3, 5, 1, 2, dtype=torch.float64).expand(3, 5, 4, 2)
    assert not GFU()(ys).any()
    assert not GFU(0.5)(ys).any()


def test_the_gradient_of_the_fusion_away_from_the_threshold():
    torch.manual_seed(0)
    ys = torch.randn(3, 4, 2, dtype=torch.float64)
    fusion = GFU(0.5)
    cv = ys.std(1) / ((ys - ys.amin(1, keepdim=True)).mean(1) + 1e-5)
    assert (cv - 0.5).abs().min() > 0.01
    torch.testing.assert_close(fusion(ys), fused(ys, 0.5))
    torch.autograd.gradcheck(fusion, ys.requires_grad_())


@every_backend
@every_number_of_heads
def test_gradients_reach_every_parameter(head_num, backend):
    images.check_gradients(layer(backend, head_num=head_num), images.image(3, 4, 8, backend))


def test_block():
    torch.manual_seed(0)
    made, u = images.perturbed(MHSBlock(8, d_state=2)).double(), images.image(3, 4, 8)
    torch.testing.assert_close(made(u), u + made.self_attention(made.ln_1(u)))
    dropped = MHSBlock(8, drop_path=1.0).double()
    assert torch.equal(dropped.train()(u), u)


def test_low_precision_and_autocast():
    # The fusion divides by how far the routes lie apart, so its inputs' roundings come out larger; without it they do not.
    options = SMALL | {"gfu_t": -1e4}
    low = VSSGate(**options, dtype=torch.bfloat16)
    images.check_low_precision(layer(dtype=torch.float32, **options), low, torch.bfloat16, images.image(5, 6, 8))


def test_compiles_to_one_graph():
    images.check_compile(layer(), images.image(3, 4, 8))


def test_an_official_state_dict_has_these_names():
    engine = {"x_proj_weight": (4, 34, 32), "dt_projs_weight": (4, 32, 2), "dt_projs_bias": (4, 32)}
    engine |= {"A_logs": (128, 16), "Ds": (128,)}
    made = MHSBlock(96, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == {
        "ln_1.weight": (96,),
        "ln_1.bias": (96,),
        "self_attention.in_proj.weight": (192, 96),
        "self_attention.conv2d.weight": (96, 1, 3, 3),
        "self_attention.conv2d.bias": (96,),
        "self_attention.mhs.x_ssproj.weight": (96, 96),
        "self_attention.mhs.x_ssproj_W": (96, 96),
        **{f"self_attention.mhs.scanhead_{p}.mambaeng.{name}": s for p in "CXS" for name, s in engine.items()},
        "self_attention.mhs.cat_norm.weight": (96,),
        "self_attention.mhs.cat_norm.bias": (96,),
        "self_attention.mhs.y_proj.weight": (96, 96),
        "self_attention.out_norm.weight": (96,),
        "self_attention.out_norm.bias": (96,),
    }
    narrow = MHSM(96, head_num=4, device="meta")
    assert narrow.scanhead_Z.mambaeng.x_proj_weight.shape == (4, 34, 24)


@pytest.mark.parametrize(("head_num", "millions"), [(3, 17.386), (4, 17.257)])
def test_the_published_model_has_as_many_parameters(head_num, millions):
    """VM-UNet's frame around these blocks: an encoder of [2, 2, 2, 2] of them, a decoder of [2, 2, 2, 1], one class."""
    count = 48 * 96 + 96 + 2 * 96  # patches of 4 x 4 x 3, and their norm
    for depth, width in ((4, 96 * 8), (4, 96 * 4), (4, 96 * 2), (3, 96)):
        block = MHSBlock(width, head_num=head_num, device="meta")
        count += depth * sum(parameter.numel() for parameter in block.parameters())
    for width in (96, 192, 384):
        count += 8 * width**2 + 8 * width  # four patches become one
        count += 8 * width**2 + 2 * width  # and one becomes four
    count += 4 * 96**2 + 2 * 24 + 24 + 1  # 4 x 4 pixels of 24 channels each, their norm, the class
    assert round(count / 1e6, 3) == millions


def test_both_names_of_a_weight_stay_one_tensor():
    mixer = layer().float()
    fresh = VSSGate(**SMALL)
    fresh.load_state_dict(mixer.state_dict(), strict=True)
    assert fresh.mhs.x_ssproj_W is fresh.mhs.x_ssproj.weight
    u = images.image(2, 3, 8).float()
    torch.testing.assert_close(fresh(u), mixer(u))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_num": 2}, "head_num must be 3 or 4, got 2"),
        ({"d_model": 2}, "d_model must be at least head_num, 3, got 2"),
        ({"d_conv": 2}, "d_conv must be odd and at least 1, got 2"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VSSGate(**(SMALL | options))


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, width, 8\), got \(2, 3, 8\)"):
        layer()(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="pattern must be one of 'C', 'X', 'S', 'Z', got 'Q'"):
        ScanHead(4, pattern="Q")
