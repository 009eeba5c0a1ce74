"""EfficientVMamba's atrous scan and block: their equations token by token, odd images, names, compilation."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import AtrousSS2D, EVSSBlock
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"d_model": 4, "d_state": 2, "dt_rank": 2}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return images.perturbed(AtrousSS2D(**(SMALL | options), backend=backend)).to(device_of(backend), dtype)


def block(**options):
    torch.manual_seed(0)
    return images.perturbed(EVSSBlock(8, ssm_d_state=2, **options)).double().eval()


def scanned_by_hand(mixer, x):
    """Each sub-grid in the order published, with zeros where an image is odd."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    y = torch.zeros_like(x)
    rows, columns = (range(side // 2) for side in x.shape[1:3])
    orders = [
        [(2 * i, 2 * j) for i in rows for j in columns],
        [(2 * i + 1, 2 * j) for j in columns for i in rows],
        [(2 * i, 2 * j + 1) for i in rows for j in columns],
        [(2 * i + 1, 2 * j + 1) for j in columns for i in rows],
    ]
    for k, order in enumerate(orders):
        A, D = -mixer.A_logs.unflatten(0, (4, -1))[k].exp(), mixer.Ds.view(4, -1)[k]
        h = 0
        for i, j in order:
            u = x[:, i, j]
            low, B, C = (u @ mixer.x_proj_weight[k].T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=1)
            dt = torch.log1p(torch.exp(low @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k]))
            h = torch.exp(dt[:, :, None] * A) * h + (dt * u)[:, :, None] * B[:, None]
            y[:, i, j] = (h * C[:, None]).sum(-1) + D * u
    return y[:, :height, :width]


def mixed_by_hand(mixer, u):
    x, z = mixer.in_proj(u).chunk(2, dim=3)
    x = F.silu(mixer.conv2d(x.movedim(3, 1))).movedim(1, 3)
    return mixer.out_proj(mixer.out_norm(scanned_by_hand(mixer, x)) * F.silu(z))


@every_backend
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (2, 3), (1, 1), (1, 4), (5, 1)], ids=str)
def test_equations(size, backend):
    mixer, u = layer(backend), images.image(*size, 4, backend)
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0]).shape == u[:0].shape


@every_backend
def test_sub_grids_do_not_know_of_each_other(backend):
    mixer, x = layer(backend), images.image(4, 6, 8, backend)
    other = x.clone()
    other[:, 1::2, ::2] += 1
    same = (mixer.scan(x) == mixer.scan(other)).all(dim=3)
    assert same[:, ::2].all()
    assert same[:, :, 1::2].all()
    assert not same[:, 1::2, ::2].any()


def test_block_of_one_pixel_and_of_no_image():
    made, u = block(), images.image(1, 1, 8)
    normed = made.norm(u)
    convolved = made.conv_branch(normed.movedim(3, 1)).movedim(1, 3)
    expected = u + made.se(mixed_by_hand(made.op, normed)) + made.se(convolved)
    torch.testing.assert_close(made(u), expected, rtol=1e-10, atol=1e-10)
    assert made(u[:0]).shape == u[:0].shape


@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
def test_block(mlp_ratio):
    made, u = block(mlp_ratio=mlp_ratio), images.image(3, 5, 8)
    made.conv_branch[1].running_mean += 0.3
    normed = F.layer_norm(u, (8,), made.norm.weight, made.norm.bias)
    conv = made.conv_branch
    branch = F.gelu(conv[1](F.conv2d(normed.movedim(3, 1), conv[0].weight, conv[0].bias, padding=1, groups=8)))
    branch = F.conv2d(branch, conv[3].weight, conv[3].bias).movedim(1, 3)

    def gated(x):
        mean = F.layer_norm(x, (8,), made.se.norm.weight, made.se.norm.bias).mean((1, 2), keepdim=True)
        return x * torch.sigmoid(made.se.channel_select(F.gelu(made.se.global_reduce(mean))))

    expected = u + gated(mixed_by_hand(made.op, normed)) + gated(branch)
    if mlp_ratio:
        expected = expected + made.mlp(made.norm2(expected))
    torch.testing.assert_close(made(u), expected, rtol=1e-10, atol=1e-10)


@every_backend
def test_gradients_reach_every_parameter(backend):
    images.check_gradients(layer(backend), images.image(3, 6, 4, backend))


def test_gradients_of_the_block_are_the_same_when_computed_again():
    u = images.image(3, 4, 8)
    kept, again = block(mlp_ratio=2.0), block(mlp_ratio=2.0, use_checkpoint=True)
    images.check_gradients(kept, u)
    for made in (kept, again):
        made(u).square().sum().backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_stochastic_depth_leaves_the_branches_out():
    made, u = block(drop_path=1.0), images.image(3, 4, 8)
    assert torch.equal(made.train()(u), u)


def test_low_precision_and_autocast():
    low = AtrousSS2D(**SMALL, dtype=torch.bfloat16)
    images.check_low_precision(layer(dtype=torch.float32), low, torch.bfloat16, images.image(5, 6, 4))


def test_compiles_to_one_graph():
    images.check_compile(layer(), images.image(3, 4, 4))


def test_official_state_dicts_have_these_names():
    made = EVSSBlock(48, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert {name for name in shapes if not name.startswith(("op.", "conv_branch.1."))} == {
        "norm.weight",
        "norm.bias",
        "conv_branch.0.weight",
        "conv_branch.0.bias",
        "conv_branch.3.weight",
        "conv_branch.3.bias",
        *(f"se.{name}.{kind}" for name in ("norm", "global_reduce", "channel_select") for kind in ("weight", "bias")),
    }
    assert shapes["op.x_proj_weight"] == (4, 35, 96)
    assert shapes["se.global_reduce.weight"] == (6, 48)
    assert shapes["conv_branch.3.weight"] == (48, 48, 1, 1)
    assert {name.split(".")[0] for name in EVSSBlock(8, mlp_ratio=4.0).state_dict()} >= {"norm2", "mlp"}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="step_size must be 2, of which there are four sub-grids, got 3"):
        AtrousSS2D(4, step_size=3)
    with pytest.raises(ValueError, match=r"mlp_ratio must be at least 0, got -1"):
        EVSSBlock(8, mlp_ratio=-1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, width, 4\), got \(2, 3, 4\)"):
        layer()(torch.zeros(2, 3, 4))
