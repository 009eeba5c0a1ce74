"""Mamba-YOLO's blocks: their equations, the scan against SS2D's, published weights, names, compilation."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import SS2D, YOLOSS2D, LSBlock, ODSSBlock, RGBlock, XSSBlock
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"in_channels": 4, "hidden_dim": 6, "ssm_d_state": 2}


def block(made=ODSSBlock, backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return images.perturbed(made(**(SMALL | options), backend=backend)).to(device_of(backend), dtype)


def picture(height, width, channels=4, backend="auto"):
    return images.image(height, width, channels, backend).movedim(3, 1)


def scanned_by_hand(mixer, u):
    """The equations of the scan, (batch, channels, height, width), one token at a time."""
    x, z = F.conv2d(u, mixer.in_proj.weight[:, :, None, None]).chunk(2, dim=1)
    x = F.gelu(F.conv2d(x, mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=x.shape[1]))
    tokens, rank, states = x.flatten(2).mT, mixer.dt_rank, mixer.d_state
    rows = torch.arange(tokens.shape[1])
    columns = rows.view(u.shape[2:]).T.flatten()
    total = 0
    for k, order in enumerate((rows, columns, rows.flip(0), columns.flip(0))):
        A, D = -mixer.A_logs.unflatten(0, (4, -1))[k].exp(), mixer.Ds.view(4, -1)[k]
        h, y = 0, torch.zeros_like(tokens)
        for token in order:
            v = tokens[:, token]
            low, B, C = (v @ mixer.x_proj_weight[k].T).split([rank, states, states], dim=1)
            dt = F.softplus(low @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k])
            h = torch.exp(dt[:, :, None] * A) * h + (dt * v)[:, :, None] * B[:, None]
            y[:, token] = (h * C[:, None]).sum(-1) + D * v
        total = total + y
    y = F.layer_norm(total, total.shape[-1:], mixer.out_norm.weight, mixer.out_norm.bias).mT.view(x.shape) * F.gelu(z)
    return F.conv2d(y, mixer.out_proj.weight[:, :, None, None])


def local_by_hand(made, x):
    y = F.conv2d(x, made.fc1.weight, made.fc1.bias, padding=1, groups=x.shape[1])
    y = F.batch_norm(y, made.norm.running_mean, made.norm.running_var, made.norm.weight, made.norm.bias, eps=1e-3)
    y = F.gelu(F.conv2d(y, made.fc2.weight, made.fc2.bias))
    return x + F.conv2d(y, made.fc3.weight, made.fc3.bias)


def gated_by_hand(made, x):
    x, v = F.conv2d(x, made.fc1.weight, made.fc1.bias).chunk(2, dim=1)
    local = F.conv2d(x, made.dwconv.weight, made.dwconv.bias, padding=1, groups=x.shape[1])
    return F.conv2d(F.gelu(local + x) * v, made.fc2.weight, made.fc2.bias)


def normed(norm, x):
    return F.layer_norm(x.movedim(1, 3), x.shape[1:2], norm.norm.weight, norm.norm.bias, 1e-6).movedim(3, 1)


@every_backend
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 4)], ids=str)
def test_equations_of_the_block_of_the_backbone(size, backend):
    made, u = block(backend=backend).eval(), picture(*size, backend=backend)
    for batch_norm in (made.proj_conv[1], made.lsblock.norm):
        batch_norm.running_mean += 0.3
    y = F.conv2d(u, made.proj_conv[0].weight, made.proj_conv[0].bias)
    y = F.silu(made.proj_conv[1](y))
    y = y + scanned_by_hand(made.op, normed(made.norm, local_by_hand(made.lsblock, y)))
    y = y + gated_by_hand(made.mlp, normed(made.norm2, y))
    torch.testing.assert_close(made(u), y, rtol=1e-10, atol=1e-10)


@every_backend
def test_equations_of_the_block_of_the_neck(backend):
    made, u = block(XSSBlock, backend, n=2).eval(), picture(3, 4, backend=backend)
    y = F.silu(made.in_proj[1](F.conv2d(u, made.in_proj[0].weight)))
    x = normed(made.norm, local_by_hand(made.lsblock, y))
    y = y + scanned_by_hand(made.ss2d[1], scanned_by_hand(made.ss2d[0], x))
    y = y + gated_by_hand(made.mlp, normed(made.norm2, y))
    torch.testing.assert_close(made(u), y, rtol=1e-10, atol=1e-10)


def test_the_block_of_the_neck_projects_only_where_it_must():
    made = block(XSSBlock, in_channels=6, mlp_ratio=0.0).eval()
    assert {name.split(".")[0] for name in made.state_dict()} == {"norm", "ss2d", "lsblock"}
    u = picture(3, 4, 6)
    torch.testing.assert_close(made(u), u + made.ss2d(made.norm(made.lsblock(u))))


@every_backend
@pytest.mark.parametrize("made", [ODSSBlock, XSSBlock])
def test_gradients_reach_every_parameter(made, backend):
    images.check_gradients(block(made, backend).eval(), picture(3, 4, backend=backend))


def test_stochastic_depth_leaves_both_branches_out():
    made, u = block(drop_path=1.0), picture(3, 4)
    assert torch.equal(made(u), made.proj_conv(u))


def test_published_weights_of_projections_are_convolutions():
    made = block().eval()
    own = made.state_dict()
    published = own | {name: own[name][:, :, None, None] for name in ("op.in_proj.weight", "op.out_proj.weight")}
    fresh = ODSSBlock(**SMALL).double().eval()
    fresh.load_state_dict(published, strict=True)
    assert torch.equal(fresh(picture(3, 4)), made(picture(3, 4)))


def test_start_values():
    mixer = YOLOSS2D(64)
    assert not mixer.A_logs.any()
    assert (mixer.Ds == 1).all()
    for drawn in (mixer.dt_projs_weight, mixer.dt_projs_bias):
        assert 0.9 < drawn.std() < 1.1
    assert isinstance(mixer, SS2D)
    assert (LSBlock(4).norm.eps, LSBlock(4).norm.momentum) == (1e-3, 0.03)


def test_low_precision_and_autocast():
    low = YOLOSS2D(6, d_state=2, dtype=torch.bfloat16)
    torch.manual_seed(0)
    wide = images.perturbed(YOLOSS2D(6, d_state=2))
    images.check_low_precision(wide, low, torch.bfloat16, picture(5, 6, 6))


def test_compiles_to_one_graph():
    images.check_compile(block().eval(), picture(3, 4))


def test_official_state_dicts_have_these_names():
    scan = {
        "in_proj.weight": (64, 16),
        "conv2d.weight": (32, 1, 3, 3),
        "conv2d.bias": (32,),
        "x_proj_weight": (4, 33, 32),
        "dt_projs_weight": (4, 32, 1),
        "dt_projs_bias": (4, 32),
        "A_logs": (128, 16),
        "Ds": (128,),
        "out_norm.weight": (32,),
        "out_norm.bias": (32,),
        "out_proj.weight": (16, 32),
    }
    rest = {
        **{f"{norm}.norm.{kind}": (16,) for norm in ("norm", "norm2") for kind in ("weight", "bias")},
        "lsblock.fc1.weight": (16, 1, 3, 3),
        "lsblock.fc1.bias": (16,),
        "lsblock.fc2.weight": (16, 16, 1, 1),
        "lsblock.fc2.bias": (16,),
        "lsblock.fc3.weight": (16, 16, 1, 1),
        "lsblock.fc3.bias": (16,),
        "mlp.fc1.weight": (84, 16, 1, 1),
        "mlp.fc1.bias": (84,),
        "mlp.dwconv.weight": (42, 1, 3, 3),
        "mlp.dwconv.bias": (42,),
        "mlp.fc2.weight": (16, 42, 1, 1),
        "mlp.fc2.bias": (16,),
    }
    made = ODSSBlock(8, 16, device="meta")
    names = {name: tuple(p.shape) for name, p in made.named_parameters() if "lsblock.norm" not in name}
    assert names == rest | {f"op.{name}": shape for name, shape in scan.items()} | {
        "proj_conv.0.weight": (16, 8, 1, 1),
        "proj_conv.0.bias": (16,),
        "proj_conv.1.weight": (16,),
        "proj_conv.1.bias": (16,),
    }
    made = XSSBlock(8, 16, n=3, device="meta")
    names = {name: tuple(p.shape) for name, p in made.named_parameters() if "lsblock.norm" not in name}
    assert names == rest | {f"ss2d.{i}.{name}": shape for name, shape in scan.items() for i in range(3)} | {
        "in_proj.0.weight": (16, 8, 1, 1),
        "in_proj.1.weight": (16,),
        "in_proj.1.bias": (16,),
    }


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        XSSBlock(4, 4, n=0)
    with pytest.raises(ValueError, match="mlp_ratio must be at least 0, got -1"):
        ODSSBlock(4, 4, mlp_ratio=-1.0)
    with pytest.raises(ValueError, match="hidden_features must be at least 2, got 1"):
        RGBlock(4, 1)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 6, height, width\), got \(2, 4, 3, 3\)"):
        YOLOSS2D(6)(torch.zeros(2, 4, 3, 3))
