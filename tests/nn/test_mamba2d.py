"""Mamba2D: the official block's numbers, its equations cell by cell, corners, one row or column, low precision."""

import images
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.nn import Mamba2D, Mamba2DBlock
from ssmkit.testing import available, device_of

BACKENDS = [name for name in available("grid_scan", reference=True) if name != "triton" or torch.cuda.is_available()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = Mamba2D(**({"d_model": 6, "d_state": 3} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


@every_backend
@pytest.mark.parametrize("name", names("mamba2d_block*"))
def test_official_block(name, backend):
    case = load(name)
    mixer = Mamba2D(**case.meta["config"], backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, mixer.to(device_of(backend), dtype))


def mixed_by_hand(mixer, u):
    """The layer's equations, one cell at a time."""
    weights = dict(mixer.named_parameters())
    rank, states = mixer.dt_rank, mixer.d_state
    corner = mixer.scan_start
    flips = [axis for axis, far in ((1, corner[0] == "B"), (2, corner[1] == "R")) if far]
    x = F.gelu(u.flip(flips) @ weights["in_proj.weight"].T + weights["in_proj.bias"])
    parts = (x @ weights["x_proj.weight"].T).split([rank, rank, states, states, states], dim=-1)
    C, sides = parts[4], {}
    for side, low, B in (("T", parts[0], parts[2]), ("L", parts[1], parts[3])):
        logits = low @ weights[f"dt_proj{side}.weight"].T + weights[f"dt_proj{side}.bias"]
        dt = torch.log1p(logits.exp())
        a = torch.exp(dt[..., None] * -weights[f"A{side}_log"].exp())
        sides[side] = a, (dt * x)[..., None] * B[..., None, :]
    (a_top, b_top), (a_left, b_left) = sides["T"], sides["L"]
    h, y = {}, torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            left = b_left[:, i, j] + (a_left[:, i, j] * h[i, j - 1] if j else 0)
            top = b_top[:, i, j] + (a_top[:, i, j] * h[i - 1, j] if i else 0)
            h[i, j] = left if i == 0 else top if j == 0 else (left + top) / 2
            y[:, i, j] = (h[i, j] * C[:, i, j, None]).sum(-1) + weights["D"] * x[:, i, j]
    y = F.gelu(y) @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    y = y.flip(flips)
    if mixer.local_path is None:
        return y

    def star(x, act):
        return weights[f"local_path.{act}.scale"] * x.clamp(min=0) ** 2 + weights[f"local_path.{act}.bias"]

    local = F.layer_norm(u, u.shape[-1:], weights["local_norm.weight"], weights["local_norm.bias"])
    local = star(local @ weights["local_path.pwconv1.weight"].T, "act1").movedim(-1, 1)
    local = F.conv2d(local, weights["local_path.dwconv.weight"], padding=1, groups=local.shape[1])
    return y + star(local.movedim(1, -1), "act2") @ weights["local_path.pwconv2.weight"].T


@every_backend
@pytest.mark.parametrize("corner", ["TL", "TR", "BL", "BR"])
def test_equations_from_every_corner(corner, backend):
    mixer = layer(backend, scan_start=corner, local_path=True, expand_factor=2, dt_rank=2)
    u = images.image(5, 3, 6, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)


@every_backend
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_images_of_one_row_or_column(size, backend):
    mixer = layer(backend, local_path=True)
    u = images.image(*size, 6, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0]).shape == u[:0].shape


@every_backend
def test_gradients_reach_every_parameter(backend):
    images.check_gradients(layer(backend, local_path=True), images.image(4, 5, 6, backend))


def test_an_official_state_dict_has_these_names():
    mixer = Mamba2D(32, local_path=True)
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == {
        "local_norm.weight": (32,),
        "local_norm.bias": (32,),
        "local_path.pwconv1.weight": (64, 32),
        "local_path.act1.scale": (1,),
        "local_path.act1.bias": (1,),
        "local_path.dwconv.weight": (64, 1, 3, 3),
        "local_path.act2.scale": (1,),
        "local_path.act2.bias": (1,),
        "local_path.pwconv2.weight": (32, 64),
        "in_proj.weight": (32, 32),
        "in_proj.bias": (32,),
        "x_proj.weight": (2 * 2 + 3 * 16, 32),
        "dt_projT.weight": (32, 2),
        "dt_projT.bias": (32,),
        "dt_projL.weight": (32, 2),
        "dt_projL.bias": (32,),
        "AT_log": (32, 16),
        "AL_log": (32, 16),
        "D": (32,),
        "out_proj.weight": (32, 32),
        "out_proj.bias": (32,),
    }


def test_start_values():
    mixer = Mamba2D(64, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(mixer.dt_projT.bias)
    assert (dt >= 0.002 * (1 - 1e-5)).all()
    assert (dt <= 0.05 * (1 + 1e-5)).all()
    assert torch.equal(mixer.dt_projT.bias, mixer.dt_projL.bias)
    assert mixer.dt_projT.weight.abs().max() <= 0.5
    torch.testing.assert_close(mixer.AL_log.exp()[5], torch.arange(1.0, 17.0))
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)} == {
        "AT_log",
        "AL_log",
        "D",
    }
    assert (Mamba2D(32, dt_init="constant").dt_projL.weight == 2**-0.5).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, backend):
    wide = layer(backend, torch.float32, local_path=True)
    low = Mamba2D(6, 3, local_path=True, dtype=dtype, backend=backend)
    images.check_low_precision(wide, low, dtype, images.image(5, 6, 6))


@pytest.mark.parametrize("kind", ["2D", "2D_local", "RopeAttention"])
def test_block_is_two_scaled_residual_branches(kind):
    torch.manual_seed(0)
    block = images.perturbed(Mamba2DBlock(8, kind, res_scale_init_value=1.0, scan_start="BR")).double()
    x = images.image(3, 5, 8)
    first = block.res_scale1.scale * x + block.token_mixer(block.norm1(x))
    hidden = F.gelu(block.norm2(first) @ block.MLP.fc1.weight.T + block.MLP.fc1.bias)
    expected = block.res_scale2.scale * first + hidden @ block.MLP.fc2.weight.T + block.MLP.fc2.bias
    torch.testing.assert_close(block(x), expected)
    images.check_gradients(block, x, idle=("token_mixer.k_norm.bias",))
    assert getattr(block.token_mixer, "scan_start", "BR") == "BR"


def test_block_without_factors_and_with_stochastic_depth():
    block, x = Mamba2DBlock(8, drop_path=1.0).double(), images.image(3, 5, 8)
    assert "res_scale1.scale" not in block.state_dict()
    assert torch.equal(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_compile(backend):
    images.check_compile(layer(backend, torch.float32, local_path=True), images.image(4, 5, 6))


BAD = {
    "d_model": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "expand_factor": ({"expand_factor": 0}, "expand_factor must be at least 1, got 0"),
    "dt_rank": ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
    "dt_min": ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got 0.2 and 0.1"),
    "scan_start": ({"scan_start": "LT"}, "scan_start must be one of TL, TR, BL, BR, got 'LT'"),
    "double_scans": ({"double_scans": True}, "double_scans must be False"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2D(**({"d_model": 8} | options))


def test_bad_calls():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, width, channels\), got \(2, 5, 6\)"):
        layer()(torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match=r"x must have shape \(2, 5, 4, 6\) .*, got \(2, 5, 4, 7\)"):
        layer()(torch.zeros(2, 5, 4, 7))
    with pytest.raises(ValueError, match="token_mixer must be '2D', '2D_local' or 'RopeAttention', got '2D_dbl_scan'"):
        Mamba2DBlock(8, "2D_dbl_scan")
