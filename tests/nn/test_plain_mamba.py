"""PlainMamba's mixer and layer: their equations token by token, what follows the paths, names, compilation."""

from itertools import pairwise

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import PlainMamba2D, PlainMambaLayer
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"d_model": 6, "d_state": 3, "dt_rank": 2, "conv_size": 3, "bias": True}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = PlainMamba2D(**(SMALL | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


def tokens(height, width, backend="auto", dim=6):
    return images.image(height, width, dim, backend).flatten(1, 2)


def snakes(height, width):
    """Tokens of the four paths and the moves that lead to them, step by step as published."""
    names = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}
    by_rows = [(i, j if i % 2 == 0 else width - 1 - j) for i in range(height) for j in range(width)]
    by_columns = [(i if j % 2 == 0 else height - 1 - i, j) for j in range(width) for i in range(height)]
    for places in (by_rows, by_rows[::-1], by_columns, by_columns[::-1]):
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
        yield [i * width + j for i, j in places], [0] + [names[step] for step in steps]


def mixed_by_hand(mixer, u, height, width, *, all_follow=False):
    """The layer's equations; with `all_follow` dt, B and C walk the paths as well, which is not PlainMamba."""
    x, z = mixer.in_proj(u).chunk(2, dim=2)
    image = x.mT.unflatten(2, (height, width))
    x = F.silu(F.conv2d(image, mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=x.shape[2])).flatten(2).mT
    low, B, C = (x @ mixer.x_proj.weight.T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=2)
    dt = low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias
    dt = torch.log1p(torch.exp(dt + mixer.dt_proj.bias))
    total = 0
    for order, came in snakes(height, width):
        h, y = x.new_zeros(x.shape[0], x.shape[2], mixer.d_state), torch.zeros_like(x)
        for p, token in enumerate(order):
            q = token if all_follow else p
            b = B[:, q] + mixer.direction_Bs[came[p]]
            h = torch.exp(dt[:, q, :, None] * -mixer.A_log.exp()) * h
            h = h + (dt[:, q] * x[:, token])[:, :, None] * b[:, None]
            y[:, token] = (h * C[:, q, None]).sum(-1) + mixer.D * x[:, token]
        total = total + y
    out = mixer.out_proj(total * F.silu(z))
    return out if mixer.gamma is None else out * mixer.gamma


@every_backend
@pytest.mark.parametrize("size", [(3, 5), (4, 3), (1, 1), (1, 6), (5, 1)], ids=str)
def test_equations(size, backend):
    mixer, u = layer(backend, init_layer_scale=0.5), tokens(*size, backend)
    torch.testing.assert_close(mixer(u, size), mixed_by_hand(mixer, u, *size), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0], size).shape == u[:0].shape


def test_dt_b_and_c_stay_behind():
    mixer, u = layer(), tokens(3, 5)
    together = mixed_by_hand(mixer, u, 3, 5, all_follow=True)
    assert (mixer(u, (3, 5)) - together).abs().max() > 1e-3 * together.abs().max()


@every_backend
def test_gradients_reach_every_parameter(backend):
    mixer = layer(backend, init_layer_scale=0.5, default_hw_shape=(3, 4))
    images.check_gradients(mixer, tokens(3, 4, backend))


def test_layer():
    torch.manual_seed(0)
    options = {"mamba_cfg": {**SMALL, "default_hw_shape": (3, 5)}, "with_dwconv": True}
    made = images.perturbed(PlainMambaLayer(6, **options)).double().eval()
    u = tokens(3, 5)
    x = u + made.mamba(F.layer_norm(u, (6,), made.norm.weight, made.norm.bias))
    image = F.conv2d(x.mT.unflatten(2, (3, 5)), made.dw[0].weight, padding=1, groups=6)
    expected = F.gelu(made.dw[1](image)).flatten(2).mT
    torch.testing.assert_close(made(u), expected, rtol=1e-10, atol=1e-10)
    images.check_gradients(made, u)
    plain = PlainMambaLayer(6, use_rms_norm=True, drop_path_rate=1.0, mamba_cfg=SMALL).double()
    assert torch.equal(plain.train()(u, (3, 5)), u)
    assert not torch.equal(plain.eval()(u, (3, 5)), u)


def test_low_precision_and_autocast():
    options = SMALL | {"default_hw_shape": (5, 6)}
    low = PlainMamba2D(**options, dtype=torch.bfloat16)
    images.check_low_precision(layer(dtype=torch.float32, **options), low, torch.bfloat16, tokens(5, 6))


def test_compiles_to_one_graph():
    images.check_compile(layer(default_hw_shape=(3, 4)), tokens(3, 4))


def test_an_official_state_dict_has_these_names():
    mixer = PlainMamba2D(192, bias=True, device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == {
        "A_log": (384, 16),
        "D": (384,),
        "direction_Bs": (5, 16),
        "in_proj.weight": (768, 192),
        "in_proj.bias": (768,),
        "conv2d.weight": (384, 1, 7, 7),
        "conv2d.bias": (384,),
        "x_proj.weight": (44, 384),
        "dt_proj.weight": (384, 12),
        "dt_proj.bias": (384,),
        "out_proj.weight": (192, 384),
        "out_proj.bias": (192,),
    }
    made = PlainMambaLayer(8, with_dwconv=True, device="meta")
    assert {name.split(".")[0] for name in made.state_dict()} == {"norm", "dw", "mamba"}


def test_start_values():
    mixer = PlainMamba2D(32)
    torch.testing.assert_close(mixer.A_log.exp()[7], torch.arange(1.0, 17.0))
    assert (mixer.D == 1).all()
    assert 0.005 < mixer.direction_Bs.std() < 0.05
    dt = F.softplus(mixer.dt_proj.bias)
    assert (dt > 0.0009).all()
    assert (dt < 0.11).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"conv_size": 4}, "conv_size must be odd, got 4"),
        ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PlainMamba2D(**(SMALL | options))


def test_bad_calls_are_named():
    mixer = PlainMamba2D(**SMALL)
    with pytest.raises(ValueError, match="hw_shape must be given"):
        mixer(torch.zeros(1, 6, 6))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 8, 6\) for hw_shape \(2, 4\), got \(1, 6, 6\)"):
        mixer(torch.zeros(1, 6, 6), (2, 4))
