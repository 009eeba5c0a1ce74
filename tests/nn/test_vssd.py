"""VSSD: the official mixer's and block's numbers, its equations, no order of tokens, causal forms, low precision."""

import images
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.nn import VSSD, VSSDBlock
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("ssd_noncausal", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
CAUSAL = {
    "forwards": {"linear_attn_duality": False},
    "both ways": {"linear_attn_duality": False, "bidirection": True, "ngroups": 2},
}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = VSSD(**({"d_model": 6, "headdim": 3, "d_state": 5} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


def tokens(backend="auto", height=3, width=5, dim=6):
    return images.image(height, width, dim, backend).flatten(1, 2)


@every_backend
@pytest.mark.parametrize("name", names("vssd_mixer*"))
def test_official_mixer(name, backend):
    case = load(name)
    config = dict(case.meta["config"])
    size = config.pop("H"), config.pop("W")
    mixer = VSSD(**config, backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, mixer.to(device_of(backend), dtype), *size)


@every_backend
def test_official_block(backend):
    case = load("vssd_block")
    block = VSSDBlock(**case.meta["config"], backend=backend)
    block.load_state_dict(case.params, strict=True)
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, block.to(device_of(backend), dtype))


@every_backend
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("ngroups", [1, 2, -1])
def test_equations(ngroups, positive, backend):
    mixer, u = layer(backend, ngroups=ngroups, ssd_positve_dA=positive), tokens(backend)
    groups = mixer.ngroups
    z, xBC, dt = (u @ mixer.in_proj.weight.T).split((12, 12 + 10 * groups, 4), dim=-1)
    padded = F.pad(xBC.unflatten(1, (3, 5)), (0, 0, 1, 1, 1, 1))
    around = [padded[:, i : i + 3, j : j + 5] * mixer.conv2d.weight[:, 0, i, j] for i in range(3) for j in range(3)]
    xBC = F.silu(sum(around) + mixer.conv2d.bias).flatten(1, 2)
    x, B, C = xBC.split((12, 5 * groups, 5 * groups), dim=-1)
    heads = []
    for h in range(4):
        x_LP = x[..., 3 * h : 3 * h + 3]
        B_LN, C_LN = (t[..., 5 * (h % groups) : 5 * (h % groups) + 5] for t in (B, C))
        weight = torch.log1p((dt[..., h] + mixer.dt_bias[h]).exp()) * mixer.A_log[h].exp()
        state = torch.einsum("bl,bln,blp->bnp", weight if positive else -weight, B_LN, x_LP)
        heads.append(C_LN @ state + mixer.D[h] * x_LP)
    y = F.layer_norm(torch.cat(heads, dim=-1), (12,), mixer.norm.weight, mixer.norm.bias) * z
    torch.testing.assert_close(mixer(u, 3, 5), y @ mixer.out_proj.weight.T, rtol=1e-10, atol=1e-10)


def test_without_neighbours_tokens_have_no_order():
    """Where the convolution sees the cell alone, any permutation of the tokens permutes the outputs."""
    mixer, u = layer(), tokens()
    with torch.no_grad():
        mixer.conv2d.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(u[:, order], 3, 5), mixer(u, 3, 5)[:, order])
    assert not torch.allclose(layer()(u[:, order], 3, 5), layer()(u, 3, 5)[:, order])


def test_without_output_weights_the_skip_is_left():
    mixer, u = layer(), tokens()
    with torch.no_grad():
        mixer.conv2d.weight[-5:], mixer.conv2d.bias[-5:] = 0.0, 0.0
    seen = []
    mixer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mixer(u, 3, 5)
    mixer.A_log.data += 1.0
    mixer(u, 3, 5)
    mixer.D.data *= 2.0
    mixer(u, 3, 5)
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], 2 * seen[1])


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_causal_forms_tell_earlier_from_later(options):
    mixer, u = layer(**options), tokens(height=1)
    with torch.no_grad():
        mixer.conv2d.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
    changed = u.clone()
    changed[:, 2] += 1.0
    differs = (mixer(changed, 1, 5) - mixer(u, 1, 5)).abs().amax((0, 2)) > 0
    assert differs.tolist() == ([True] * 5 if "bidirection" in options else [False, False, True, True, True])


@every_backend
@pytest.mark.parametrize("options", [{}, *CAUSAL.values()], ids=["without an order", *CAUSAL])
def test_gradients_reach_every_parameter(options, backend):
    images.check_gradients(layer(backend, **options), tokens(backend), 3, 5)


@pytest.mark.parametrize("attn_type", ["mamba2", "standard"])
def test_block_is_two_branches_after_convolutions(attn_type):
    torch.manual_seed(0)
    block, u = images.perturbed(VSSDBlock(8, (3, 5), 2, attn_type=attn_type, d_state=4)).double(), tokens(dim=8)

    def positions(conv, x):
        image = F.conv2d(x.unflatten(1, (3, 5)).movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=8)
        return x + image.movedim(1, -1).flatten(1, 2)

    x = positions(block.cpe1, u)
    x = positions(block.cpe2, x + block.attn(block.norm1(x), 3, 5))
    expected = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(block(u), expected)
    torch.testing.assert_close(block(u, 3, 5), expected)
    images.check_gradients(block, u)


def test_standard_attention():
    block, x = VSSDBlock(8, (3, 5), 2, attn_type="standard").double(), tokens(dim=8)
    q, k, v = (x @ block.attn.to_qkv.weight.T).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., part] @ k[..., part].mT / 2).softmax(-1) @ v[..., part])
    expected = torch.cat(heads, -1) @ block.attn.to_out.weight.T + block.attn.to_out.bias
    torch.testing.assert_close(block.attn(x, 3, 5), expected)


def test_stochastic_depth_leaves_the_convolutions():
    block, x = VSSDBlock(8, (3, 5), 2, drop_path=1.0).double(), tokens(dim=8)
    assert not torch.equal(block.train()(x), x)
    assert not torch.equal(block.train()(x), block.eval()(x))


def test_an_official_state_dict_has_these_names():
    assert {name: tuple(tensor.shape) for name, tensor in VSSD(48, headdim=48, d_state=48).state_dict().items()} == {
        "in_proj.weight": (2 * 96 + 2 * 48 + 2, 48),
        "conv2d.weight": (96 + 2 * 48, 1, 3, 3),
        "conv2d.bias": (96 + 2 * 48,),
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "norm.weight": (96,),
        "norm.bias": (96,),
        "out_proj.weight": (48, 96),
    }
    names = VSSDBlock(8, (3, 5), 2, attn_type="standard").state_dict()
    assert {name for name in names if name.startswith("attn.")} == {
        "attn.to_qkv.weight",
        "attn.to_out.weight",
        "attn.to_out.bias",
    }


def test_start_values():
    mixer = VSSD(64, headdim=1, A_init_range=(2, 3), dt_min=0.002, dt_max=0.05)
    for values, low, high in ((mixer.A_log.exp(), 2, 3), (F.softplus(mixer.dt_bias), 0.002, 0.05)):
        assert low * (1 - 1e-5) <= values.min() <= values.max() <= high * (1 + 1e-5)
    assert (mixer.D == 1).all()
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.dt_bias, mixer.D))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)], ids=str)
def test_small_images(size):
    mixer, u = layer(), tokens(height=size[0], width=size[1])
    assert torch.isfinite(mixer(u, *size)).all()
    assert mixer(u[:0], *size).shape == u[:0].shape


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, backend):
    low = VSSD(6, headdim=3, d_state=5, dtype=dtype, backend=backend)
    images.check_low_precision(layer(backend, torch.float32), low, dtype, tokens(), 3, 5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_compile(backend):
    images.check_compile(layer(backend, torch.float32), tokens(), 3, 5)


BAD = {
    "d_model": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "d_conv": ({"d_conv": 4}, "d_conv must be odd, so that the image keeps its size, got 4"),
    "headdim": ({"headdim": 5}, "headdim must divide the inner width 16, got 5"),
    "ngroups": ({"ngroups": 3}, "ngroups must divide the number of heads 4, or be -1, got 3"),
    "A_init_range": ({"A_init_range": (0, 1)}, r"A_init_range must be .*, got \(0, 1\)"),
    "dt_min": ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got 0.2 and 0.1"),
    "bidirection": ({"bidirection": True}, "bidirection needs linear_attn_duality=False"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VSSD(**({"d_model": 8, "headdim": 4} | options))


def test_bad_calls():
    with pytest.raises(
        ValueError, match=r"u must have shape \(2, 12, 6\) \(batch, H \* W, d_model\), got \(2, 15, 6\)"
    ):
        layer()(tokens(), 3, 4)
    block = VSSDBlock(8, (3, 5), 2)
    with pytest.raises(ValueError, match="H and W must be given together, got H=3 and W=None"):
        block(torch.zeros(1, 15, 8), 3)
    with pytest.raises(ValueError, match="num_heads must divide dim 8, got 3"):
        VSSDBlock(8, (3, 5), 3)
    with pytest.raises(ValueError, match="attn_type must be 'mamba2' or 'standard', got 'softmax'"):
        VSSDBlock(8, (3, 5), 2, attn_type="softmax")
