"""DBM: the published layer's arithmetic with flips, its names and size, pads, paths, compilation."""

import images
import mixers
import pytest
import torch
import torch.nn.functional as F

from ssmkit import paths
from ssmkit.nn import DBM, BiMamba, Mamba
from ssmkit.testing import device_of

BACKENDS = [
    name for name in mixers.usable("selective_scan", "causal_conv1d") if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = DBM(**({"d_model": 8, "d_state": 3, "expand": 1} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


def with_flips(mixer, u):
    """The equations of the published code: both halves on the batch axis, one of them flipped, one scan after another."""
    w = dict(mixer.named_parameters())
    x_f, z_f, x_b, z_b = F.linear(u, w["in_proj.weight"], w.get("in_proj.bias")).chunk(4, dim=-1)
    x, z = torch.cat((x_f, x_b.flip(1))), torch.cat((z_f, z_b.flip(1)))
    length, dim = x.shape[1:]
    x = F.conv1d(x.mT, w["conv1d.weight"], w["conv1d.bias"], padding=mixer.d_conv - 1, groups=dim)[..., :length].mT
    x = F.silu(x)
    low, B, C = (x @ w["x_proj.weight"].T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    h, y = torch.zeros(*x[:, 0].shape, mixer.d_state).to(x), []
    for t in range(length):
        decay = torch.exp(dt[:, t, :, None] * -w["A_log"].exp())
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1) + w["D"] * x[:, t])
    y_f, y_b = (torch.stack(y, dim=1) * F.silu(z)).chunk(2)
    return F.linear(torch.cat((y_f, y_b.flip(1)), dim=-1), w["out_proj.weight"], w.get("out_proj.bias"))


@every_backend
@pytest.mark.parametrize("options", [{}, {"expand": 2, "bias": True, "d_conv": 3, "dt_rank": 2}], ids=str)
def test_equations(options, backend):
    mixer, u = layer(backend, **options), mixers.tokens(backend)
    torch.testing.assert_close(mixer(u), with_flips(mixer, u), rtol=1e-10, atol=1e-10)


@every_backend
def test_a_path_is_a_gather_before_and_a_scatter_after(backend):
    mixer, u, path = layer(backend), mixers.tokens(backend, seqlen=12), paths.snake(3, 4)
    torch.testing.assert_close(mixer(u, path=path), mixer(u[:, path.tokens()])[:, path.inverse()])


@every_backend
def test_pads_and_packed_sequences(backend):
    mixer, u = layer(backend), mixers.tokens(backend)
    for real in (slice(0, 8), slice(3, 11)):
        mixers.check_pads(mixer, u, real, (0.0, 1e3))
    expected = torch.cat([mixer(u[:1, :4]), mixer(u[:1, 4:])], dim=1)
    torch.testing.assert_close(mixer(u[:1], cu_seqlens=torch.tensor([0, 4, 11], device=u.device)), expected)


@every_backend
def test_gradients_reach_every_parameter(backend):
    images.check_gradients(layer(backend, bias=True), mixers.tokens(backend))
    assert layer(backend)(mixers.tokens(backend)[:0]).shape == (0, 11, 8)


def test_names_and_size_against_vim():
    mixer = DBM(32, expand=1)
    assert mixer.state_dict().keys() == Mamba(32).state_dict().keys()
    assert mixer.in_proj.weight.shape == (128, 32)
    assert mixer.out_proj.weight.shape == (32, 64)
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 * (1 - 1e-5) and dt.max() <= 0.1 * (1 + 1e-5)
    with torch.device("meta"):
        pair = DBM(512, expand=1), BiMamba(512)
    assert [sum(p.numel() for p in m.parameters()) for m in pair] == [1_633_792, 1_816_576]


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, backend):
    low = DBM(8, 3, expand=1, dtype=dtype, backend=backend)
    images.check_low_precision(layer(backend, torch.float32), low, dtype, mixers.tokens(backend))


def test_compile_fullgraph():
    images.check_compile(layer(dtype=torch.float32), mixers.tokens())


def test_bad_arguments():
    with pytest.raises(ValueError, match="expand must be at least 1, got 0"):
        DBM(8, expand=0)
    with pytest.raises(ValueError, match="dt_init must be 'random' or 'constant', got 'zeros'"):
        DBM(8, dt_init="zeros")
