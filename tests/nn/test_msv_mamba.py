"""MSVMamba's multi-scale scan and block: their equations token by token, the state carried over, names, compilation."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import MS2D, ConvFFN, MSVSSBlock
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"d_model": 4, "d_state": 2, "dt_rank": 2}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return images.perturbed(MS2D(**(SMALL | options), backend=backend)).to(device_of(backend), dtype)


def block(**options):
    torch.manual_seed(0)
    return images.perturbed(MSVSSBlock(4, ssm_d_state=2, **options)).double()


def walked(mixer, group, x, orders, *, carry=True):
    """Normalised outputs in their places, one per route over (batch, length, d_inner)."""
    A, D = -mixer.A_logs.unflatten(0, (2, -1))[group].exp(), mixer.Ds.view(2, -1)[group]
    h, ys = 0, []
    for order in orders:
        y, h = torch.zeros_like(x), h if carry else 0
        for token in order:
            u = x[:, token]
            low, B, C = (u @ mixer.x_proj_weight[group].T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=1)
            dt = torch.log1p(torch.exp(low @ mixer.dt_projs_weight[group].T + mixer.dt_projs_bias[group]))
            h = torch.exp(dt[:, :, None] * A) * h + (dt * u)[:, :, None] * B[:, None]
            y[:, token] = (h * C[:, None]).sum(-1) + D * u
        ys.append(F.layer_norm(y, y.shape[-1:], mixer.out_norm.weight, mixer.out_norm.bias))
    return ys


def coarse_orders(height, width):
    grid = torch.arange(height * width).view(height, width)
    return grid.flatten().flip(0), grid.T.flatten(), grid.T.flatten().flip(0)


def mixed_by_hand(mixer, u, *, carry=True):
    x, z = mixer.in_proj(u).chunk(2, dim=3)
    image, dim = x.movedim(3, 1), x.shape[3]
    fine = F.silu(F.conv2d(image, mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=dim))
    coarse = F.conv2d(image, mixer.conv2d_b1.weight, mixer.conv2d_b1.bias, stride=2, padding=3, groups=dim)
    coarse, (height, width) = F.silu(coarse), coarse.shape[2:]
    y0 = walked(mixer, 1, fine.flatten(2).mT, [range(fine.shape[2] * fine.shape[3])])[0]
    y1 = sum(walked(mixer, 0, coarse.flatten(2).mT, coarse_orders(height, width), carry=carry))
    y1 = F.interpolate(y1.mT.unflatten(2, (height, width)), fine.shape[2:], mode="bilinear", align_corners=False)
    y = y0.mT.unflatten(2, fine.shape[2:]) + y1
    first, second = mixer.se.fc[0].weight, mixer.se.fc[2].weight
    y = y * torch.sigmoid(F.relu(y.mean((2, 3)) @ first.T) @ second.T)[:, :, None, None]
    return mixer.out_proj(y.movedim(1, 3) * F.silu(z))


@every_backend
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1), (1, 4), (5, 1)], ids=str)
def test_equations(size, backend):
    mixer, u = layer(backend), images.image(*size, 4, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0]).shape == u[:0].shape


@every_backend
def test_the_state_is_carried_from_route_to_route(backend):
    mixer, u = layer(backend), images.image(5, 6, 4, backend)
    apart = mixed_by_hand(mixer, u, carry=False)
    assert (mixer(u) - apart).abs().max() > 1e-4 * apart.abs().max()


@every_backend
def test_what_a_route_ends_with_reaches_the_start_of_the_next(backend):
    """The first token of the columns' outcome depends on the last coarse cell, where the rows' walk began before it."""
    mixer, x = layer(backend), images.image(3, 2, 8, backend)
    first = walked(mixer, 0, x.flatten(1, 2), coarse_orders(3, 2))[1][:, 0]
    other = x.clone()
    other[:, 2, 1] += 1
    assert not torch.allclose(walked(mixer, 0, other.flatten(1, 2), coarse_orders(3, 2))[1][:, 0], first)
    for image in (x, other):
        expected = sum(walked(mixer, 0, image.flatten(1, 2), coarse_orders(3, 2))).view_as(image)
        torch.testing.assert_close(mixer.scan_coarse(image), expected, rtol=1e-10, atol=1e-10)


@every_backend
def test_gradients_reach_every_parameter(backend):
    # The squeeze has one channel here; seed and sizes leave its ReLU open for one image at least.
    images.check_gradients(layer(backend), images.image(4, 5, 4, backend))


def test_block():
    made, u = block(), images.image(3, 5, 4)
    middle = u + made.op(made.norm(u))
    x = made.norm2(middle).movedim(3, 1)
    ffn = made.convFFN
    x = F.conv2d(x, ffn.linear1.weight, ffn.linear1.bias)
    x = F.gelu(x + F.conv2d(x, ffn.dwc.weight, ffn.dwc.bias, padding=1, groups=8))
    x = F.conv2d(x, ffn.linear2.weight, ffn.linear2.bias).movedim(1, 3)
    torch.testing.assert_close(made(u), middle + x, rtol=1e-10, atol=1e-10)
    dropped = block(drop_path=1.0)
    assert torch.equal(dropped.train()(u), u)


def test_gradients_of_the_block_are_the_same_when_computed_again():
    u = images.image(3, 4, 4)
    kept, again = block(), block(use_checkpoint=True)
    for made in (kept, again):
        made(u).square().sum().backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


def test_without_squeeze_and_excitation():
    mixer = layer(add_se=False)
    assert not any(name.startswith("se.") for name in mixer.state_dict())
    assert mixer(images.image(3, 4, 4)).shape == (2, 3, 4, 4)


def test_low_precision_and_autocast():
    low = MS2D(**SMALL, dtype=torch.bfloat16)
    images.check_low_precision(layer(dtype=torch.float32), low, torch.bfloat16, images.image(5, 6, 4))


def test_compiles_to_one_graph():
    images.check_compile(layer(), images.image(3, 4, 4))


def test_an_official_state_dict_has_these_names():
    made = MSVSSBlock(96, ssm_d_state=1, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == {
        **{f"{norm}.{kind}": (96,) for norm in ("norm", "norm2") for kind in ("weight", "bias")},
        "op.in_proj.weight": (384, 96),
        "op.conv2d.weight": (192, 1, 3, 3),
        "op.conv2d.bias": (192,),
        "op.conv2d_b1.weight": (192, 1, 7, 7),
        "op.conv2d_b1.bias": (192,),
        "op.x_proj_weight": (2, 8, 192),
        "op.dt_projs_weight": (2, 192, 6),
        "op.dt_projs_bias": (2, 192),
        "op.A_logs": (384, 1),
        "op.Ds": (384,),
        "op.out_norm.weight": (192,),
        "op.out_norm.bias": (192,),
        "op.se.fc.0.weight": (24, 192),
        "op.se.fc.2.weight": (192, 24),
        "op.out_proj.weight": (96, 192),
        "convFFN.linear1.weight": (192, 96, 1, 1),
        "convFFN.linear1.bias": (192,),
        "convFFN.dwc.weight": (192, 1, 3, 3),
        "convFFN.dwc.bias": (192,),
        "convFFN.linear2.weight": (96, 192, 1, 1),
        "convFFN.linear2.bias": (96,),
    }
    assert ConvFFN(4, expansion=3).dwc.weight.shape == (12, 1, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_conv": 2}, "d_conv must be odd and at least 1, got 2"),
        ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
        ({"ssm_ratio": 1.0}, "channels must be at least reduction, 8, got 4"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MS2D(**(SMALL | options))


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, width, 4\), got \(2, 3, 4\)"):
        layer()(torch.zeros(2, 3, 4))
