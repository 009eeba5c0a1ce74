"""Vim's mixer: the official block's numbers and names, directions, paths, pads, packing, compilation."""

import images
import mixers
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit import ScanPath, paths
from ssmkit.nn import BiMamba, Mamba
from ssmkit.nn.vim import convolved
from ssmkit.testing import device_of

BACKENDS = [
    name
    for name in mixers.usable("selective_scan", "causal_conv1d", "cross_selective_scan")
    if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize("bimamba_type", ["v1", "v2"])


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = BiMamba(**({"d_model": 8, "d_state": 3} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


@every_backend
@pytest.mark.parametrize("name", names("vim_block*"))
def test_official_block(name, backend):
    case = load(name)
    mixer = BiMamba(**case.meta["config"], backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, mixer.to(device_of(backend), dtype))


def one_direction(mixer, suffix=""):
    """A `Mamba` with the weights of one of the directions of a v2 mixer."""
    alone = Mamba(mixer.d_model, mixer.d_state, mixer.d_conv, backend=mixer.backend).to(mixer.in_proj.weight)
    own = {name: tensor for name, tensor in mixer.state_dict().items() if name in alone.state_dict()}
    own |= {
        name.replace(f"{suffix}_log", "_log").replace(suffix, ""): tensor
        for name, tensor in mixer.state_dict().items()
        if suffix and suffix in name
    }
    alone.load_state_dict(own, strict=True)
    return alone


@every_backend
@pytest.mark.parametrize("halved", [False, True])
def test_two_directions_are_two_layers_one_of_them_flipped(halved, backend):
    mixer, u = layer(backend, if_divide_out=halved), mixers.tokens(backend)
    there, back = one_direction(mixer)(u), one_direction(mixer, "_b")(u.flip(1)).flip(1)
    torch.testing.assert_close(mixer(u), (there + back) / (2 if halved else 1))


@every_backend
def test_tied_directions_do_not_know_which_end_is_the_first(backend):
    mixer, u = layer(backend, init_layer_scale=0.5, bias=True), mixers.tokens(backend)
    tied = {n: t for n, t in mixer.state_dict().items() if "_b" not in n}
    tied |= {n: tied[n.replace("_b", "")] for n in mixer.state_dict() if "_b" in n}
    mixer.load_state_dict(tied)
    torch.testing.assert_close(mixer(u.flip(1)), mixer(u).flip(1))
    shared = layer(backend, bimamba_type="v1", bias=True)
    shared.load_state_dict({n: t for n, t in tied.items() if n in shared.state_dict()})
    # In v1 the convolution is causal whichever way the scan goes.
    assert (shared(u.flip(1)) - shared(u).flip(1)).abs().max() > 1e-3


@every_backend
def test_the_backward_convolution_is_anti_causal(backend):
    mixer = layer(backend)
    conv, x = mixer.conv1d_b, mixers.tokens(backend, seqlen=7, dim=16)
    y = convolved(mixer, "_b", x, {"reverse": True})
    flipped = F.conv1d(x.flip(1).mT, conv.weight, conv.bias, padding=3, groups=16)[..., :7].mT.flip(1)
    torch.testing.assert_close(y, F.silu(flipped))
    ahead = F.pad(x, (0, 0, 0, 3))  # tap 3 at the token itself, tap 0 three tokens later
    by_hand = conv.bias + sum(ahead[:, 3 - k : 10 - k] * conv.weight[:, 0, k] for k in range(4))
    torch.testing.assert_close(y, F.silu(by_hand))


@every_backend
def test_the_backward_direction_hears_of_later_tokens_only(backend):
    mixer, u = layer(backend), mixers.tokens(backend)
    with torch.no_grad():
        mixer.D.zero_()
        mixer.x_proj.weight.zero_()
    earlier, later = u.clone(), u.clone()
    earlier[:, :5] += 1
    later[:, 5:] += 1
    torch.testing.assert_close(mixer(earlier)[:, 5:], mixer(u)[:, 5:], rtol=0, atol=0)
    assert (mixer(later) != mixer(u))[:, :5].any(-1).all()


@every_backend
@every_type
@pytest.mark.parametrize("path", [paths.column(3, 4), paths.snake(3, 4, by="column")], ids=repr)
def test_a_path_is_a_gather_before_and_a_scatter_after(path, bimamba_type, backend):
    mixer, u = layer(backend, bimamba_type=bimamba_type), mixers.tokens(backend, seqlen=12)
    gathered = mixer(u[:, path.tokens()])
    torch.testing.assert_close(mixer(u, path=path), gathered[:, path.inverse()])
    torch.testing.assert_close(mixer(u, path=path, path_b=path.flip()), gathered[:, path.inverse()])


@every_backend
def test_the_directions_may_walk_different_paths(backend):
    mixer, u, path = layer(backend), mixers.tokens(backend, seqlen=12), paths.column(3, 4)
    there = one_direction(mixer)(u[:, path.tokens()])[:, path.inverse()]
    back = one_direction(mixer, "_b")(u.flip(1)).flip(1)
    torch.testing.assert_close(mixer(u, path=path, path_b=ScanPath.reverse(12)), there + back)


@every_backend
def test_outputs_of_several_paths_add_up(backend):
    mixer, u = layer(backend), mixers.tokens(backend, seqlen=12)
    both = mixer(u, path=[ScanPath.identity(12), paths.column(3, 4)])
    torch.testing.assert_close(both, mixer(u) + mixer(u, path=paths.column(3, 4)))


@every_backend
@every_type
def test_pads_are_as_if_they_were_not_there(bimamba_type, backend):
    mixer, u = layer(backend, bimamba_type=bimamba_type), mixers.tokens(backend)
    for real in (slice(0, 8), slice(3, 11), [1, 2, 5, 6, 10]):
        mixers.check_pads(mixer, u, real, (0.0, 1e3))


@every_backend
def test_packed_sequences_are_apart(backend):
    mixer, u = layer(backend), mixers.tokens(backend, batch=1)
    offsets = torch.tensor([0, 4, 5, 5, 11], device=u.device)
    expected = torch.cat([mixer(u[:, :4]), mixer(u[:, 4:5]), mixer(u[:, 5:])], dim=1)
    torch.testing.assert_close(mixer(u, cu_seqlens=offsets), expected)


@every_backend
@every_type
def test_gradients_reach_every_parameter(bimamba_type, backend):
    mixer = layer(backend, bimamba_type=bimamba_type, init_layer_scale=1.0, bias=True)
    images.check_gradients(mixer, mixers.tokens(backend))
    assert mixer(mixers.tokens(backend)[:0]).shape == (0, 11, 8)
    assert mixer(mixers.tokens(backend)[:, :1]).shape == (2, 1, 8)


def test_an_official_state_dict_has_these_names():
    both = {"A": (64, 16), "D": (64,), "conv1d": (64, 1, 4), "x_proj": (34, 64), "dt_proj": (64, 2)}
    expected = {"in_proj.weight": (128, 32), "out_proj.weight": (32, 64)}
    for suffix in ("", "_b"):
        expected |= {f"A{suffix}_log": both["A"], f"D{suffix}": both["D"]}
        expected |= {f"{n}{suffix}.weight": both[n] for n in ("conv1d", "x_proj", "dt_proj")}
        expected |= {f"conv1d{suffix}.bias": (64,), f"dt_proj{suffix}.bias": (64,)}
    assert {name: tuple(tensor.shape) for name, tensor in BiMamba(32).state_dict().items()} == expected
    v1 = {name for name in expected if "_b" not in name} | {"A_b_log"}
    assert BiMamba(32, bimamba_type="v1").state_dict().keys() == v1
    with torch.device("meta"):
        counts = [sum(p.numel() for p in BiMamba(d).parameters()) for d in (192, 384, 576, 768)]
    assert counts == [281_856, 1_042_944, 2_283_264, 4_002_816]


def test_start_values():
    mixer = BiMamba(32, dt_min=0.002, dt_max=0.05, init_layer_scale=0.3)
    dt = F.softplus(mixer.dt_proj.bias)
    assert (dt >= 0.002 * (1 - 1e-5)).all()
    assert (dt <= 0.05 * (1 + 1e-5)).all()
    assert (mixer.gamma == 0.3).all()
    torch.testing.assert_close(mixer.A_b_log.exp()[5], torch.arange(1.0, 17.0))
    flagged = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert flagged == {"A_log", "A_b_log", "D", "D_b"}


@every_backend
@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, bimamba_type, backend):
    wide = layer(backend, torch.float32, bimamba_type=bimamba_type)
    low = BiMamba(8, 3, bimamba_type=bimamba_type, dtype=dtype, backend=backend)
    images.check_low_precision(wide, low, dtype, mixers.tokens(backend))


@every_type
def test_compile_fullgraph(bimamba_type):
    mixer = layer(dtype=torch.float32, bimamba_type=bimamba_type, if_divide_out=True)
    images.check_compile(mixer, mixers.tokens(seqlen=12))
    compiled = torch.compile(lambda u: mixer(u, path=paths.column(3, 4)), fullgraph=True, backend="aot_eager")
    u = mixers.tokens(seqlen=12, dtype=torch.float32)
    torch.testing.assert_close(compiled(u), mixer(u, path=paths.column(3, 4)))


BAD = {
    "d_model": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "dt_rank": ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
    "bimamba_type": ({"bimamba_type": "none"}, r"bimamba_type must be 'v1' or 'v2', got 'none'; .* ssmkit\.nn\.Mamba"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BiMamba(**({"d_model": 8} | options))


def test_bad_calls():
    mixer, u = layer(bimamba_type="v1"), mixers.tokens(batch=1)
    with pytest.raises(ValueError, match="'v1' takes one path and no cu_seqlens"):
        mixer(u, cu_seqlens=torch.tensor([0, 11]))
    with pytest.raises(ValueError, match="path must be a ScanPath or several of them, got none"):
        mixer(u, path=[])
    with pytest.raises(ValueError, match="path must visit 11 tokens like x, got 12"):
        layer()(u, path=paths.column(3, 4))
