"""VSSBlock: the official numbers, its branches, weights in other layouts."""

from dataclasses import replace

import images
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load

from ssmkit.nn import VSSBlock
from ssmkit.nn.ss2d import released_layout
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"hidden_dim": 6, "ssm_d_state": 2, "ssm_ratio": 1.5, "forward_type": "v05_noz", "mlp_ratio": 2.0}


def block(**options):
    torch.manual_seed(0)
    return images.perturbed(VSSBlock(**(SMALL | options))).double()


@every_backend
def test_official_block(backend):
    case = load("vmamba_vssblock")
    mixer = VSSBlock(**case.meta["config"], backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    stored = {key.removeprefix("param."): value for key, value in case.gradients.items()}
    stored = released_layout(stored, mixer.state_dict())
    case = replace(case, gradients={key if key == "in.x" else f"param.{key}": g for key, g in stored.items()})
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, mixer.to(device_of(backend), dtype))


def test_norms_stand_before_the_branches_or_after_them():
    x = images.image(3, 5, 6)
    before, after = block(), block(post_norm=True)
    middle = x + before.op(before.norm(x))
    assert torch.equal(before(x), middle + before.mlp(before.norm2(middle)))
    middle = x + after.norm(after.op(x))
    assert torch.equal(after(x), middle + after.norm2(after.mlp(middle)))


def test_branches_can_be_left_out():
    x = images.image(3, 5, 6)
    mixer, channels = block(mlp_ratio=0.0), block(ssm_ratio=0.0)
    assert torch.equal(mixer(x), x + mixer.op(mixer.norm(x)))
    assert torch.equal(channels(x), x + channels.mlp(channels.norm2(x)))
    assert {name.split(".")[0] for name in mixer.state_dict()} == {"norm", "op"}
    assert {name.split(".")[0] for name in channels.state_dict()} == {"norm2", "mlp"}


def test_gated_mlp():
    made, x = block(gmlp=True, ssm_ratio=0.0), images.image(3, 5, 6)
    mlp = made.mlp
    u, z = (made.norm2(x) @ mlp.fc1.weight.T + mlp.fc1.bias).chunk(2, dim=-1)
    assert mlp.fc1.weight.shape == (24, 6)
    torch.testing.assert_close(made(x), x + (u * F.gelu(z)) @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_gradients_reach_every_parameter_and_are_the_same_when_computed_again():
    x = images.image(4, 5, 6)
    kept, again = block(), block(use_checkpoint=True)
    images.check_gradients(kept, x)
    for made in (kept, again):
        made(x).square().sum().backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_stochastic_depth_leaves_both_branches_out():
    made, x = block(drop_path=1.0), images.image(3, 5, 6)
    assert torch.equal(made.train()(x), x)
    assert not torch.equal(made.eval()(x), x)


def test_channels_first_is_the_same_without_a_copy():
    first, last, x = block(channel_first=True), block(), images.image(4, 5, 6)
    y = first(x.movedim(3, 1))
    assert torch.equal(y.movedim(1, 3), last(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_convolutions_of_one_cell_load():
    made = block()
    own = made.state_dict()
    projections = [f"{name}.weight" for name in ("op.in_proj", "op.out_proj", "mlp.fc1", "mlp.fc2")]
    fresh = VSSBlock(**SMALL).double()
    fresh.load_state_dict(own | {name: own[name][:, :, None, None] for name in projections})
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), own.values(), strict=True))


@pytest.mark.parametrize("name", ["ssm_ratio", "mlp_ratio"])
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        VSSBlock(6, **{name: -1.0})
