"""SS2D: the official numbers, its equations token by token, forward types and their names, laws, weights of each release."""

from dataclasses import replace

import images
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.nn import SS2D, ForwardType
from ssmkit.nn.ss2d import SCANS, released_layout
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"d_model": 6, "d_state": 3, "dt_rank": 2, "forward_type": "v05_noz"}
WORDS = {"cross2d": "cross", "unidi": "unidirectional", "bidi": "bidirectional", "rot90": "turned"}
FORWARD_TYPES = {
    "v0": {"fp32": True},
    "v01": {"fp32": True},
    "v2_no32": {},
    "v3noz": {"gate": None},
    "v05": {},
    "v05_noz": {"gate": None},
    "v04_ondwconv3_nozact": {"gate": "linear", "out_norm": "convolution"},
    "v02_oncnorm_noz": {"gate": None, "out_norm": "layer norm and convolution", "fp32": True},
    "v3_onsoftmax": {"out_norm": "softmax"},
    "v05_onsigmoid_noz": {"gate": None, "out_norm": "sigmoid"},
    "v05_onnone_noz_oact": {"gate": None, "out_norm": None, "out_act": True},
    "v051d_noz": {"scan": "unidirectional", "gate": None},
    "v052d_noz": {"scan": "bidirectional", "gate": None},
    "v052d3": {"scan": "turned"},
    "v052dc_noz": {"scan": "cascade", "gate": None},
}


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = SS2D(**(SMALL | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


@every_backend
@pytest.mark.parametrize("name", names("vmamba_ss2d_*"))
def test_official_layer(name, backend):
    case = load(name)
    mixer = SS2D(**case.meta["config"], backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    stored = {key.removeprefix("param."): value for key, value in case.gradients.items()}
    stored = released_layout(stored, mixer.state_dict())
    case = replace(case, gradients={key if key == "in.x" else f"param.{key}": g for key, g in stored.items()})
    for dtype in (torch.float64, torch.float32):
        images.check_official(case, mixer.to(device_of(backend), dtype))


@pytest.mark.parametrize("official", WORDS)
def test_official_cross_scan_and_merge(official):
    case = load(f"vmamba_cross_scan_{official}")
    tokens, ys = case.inputs["x"].flatten(2), case.inputs["ys"].flatten(3)
    paths = SCANS[WORDS[official]](*case.inputs["x"].shape[2:])
    scanned = torch.stack([tokens[..., path.tokens()] for path in paths], dim=1)
    assert torch.equal(scanned.double(), case.outputs["cross_scan"])
    merged = sum(ys[:, k][..., path.inverse()] for k, path in enumerate(paths))
    torch.testing.assert_close(merged, case.outputs["cross_merge"].float())


def tables(scan, height, width):
    """Tokens in the order of each path, from the definition of the published cross_scan."""
    grid = torch.arange(height * width).view(height, width)
    if scan == "turned":
        return [torch.rot90(grid, turns).flatten() for turns in range(4)]
    first, second = grid.flatten(), (grid.T if scan == "cross" else grid).flatten()
    return [first] * 4 if scan == "unidirectional" else [first, second, first.flip(0), second.flip(0)]


def walked(mixer, k, x):
    """Path k of the mixer over tokens (batch, length, d_inner) in the order given, one token at a time."""
    rank, states = mixer.dt_rank, mixer.d_state
    low, B, C = (x @ mixer.x_proj_weight[k].T).split([rank, states, states], dim=-1)
    dt = torch.log1p(torch.exp(low @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k]))
    A = -mixer.A_logs.view(4, mixer.d_inner, -1)[k].exp()
    h, y = x.new_zeros(x.shape[0], mixer.d_inner, states), []
    for token in range(x.shape[1]):
        a = torch.exp(dt[:, token, :, None] * A)
        h = a * h + (dt * x)[:, token, :, None] * B[:, token, None]
        y.append((h * C[:, token, None]).sum(-1) + mixer.Ds.view(4, -1)[k] * x[:, token])
    return torch.stack(y, dim=1)


def scanned_by_hand(mixer, x):
    """(batch, height, width, d_inner) through the scans, gathered and scattered path by path."""
    _, height, width, dim = x.shape
    if mixer.forward_type.scan != "cascade":
        total, tokens = 0, x.flatten(1, 2)
        for k, order in enumerate(tables(mixer.forward_type.scan, height, width)):
            y = torch.zeros_like(tokens)
            y[:, order] = walked(mixer, k, tokens[:, order])
            total = total + y
        return total.view_as(x)
    for first, axis in ((0, 1), (2, 2)):  # rows, then columns; the published code leaves the reversed results reversed
        lines = F.layer_norm(x, (dim,)).movedim(axis, 1)
        flat = lines.flatten(0, 1)
        y = walked(mixer, first, flat) + walked(mixer, first + 1, flat.flip(1))
        x = y.view_as(lines).movedim(1, axis)
    return x


def mixed_by_hand(mixer, x):
    """The layer's equations."""
    kind, weights = mixer.forward_type, dict(mixer.named_parameters())

    def convolved(image, weight, bias=None):
        return F.conv2d(image.movedim(-1, 1), weight, bias, padding=1, groups=image.shape[-1]).movedim(1, -1)

    def normed(image, prefix):
        return F.layer_norm(image, image.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])

    u = x @ weights["in_proj.weight"].T
    u, z = u.chunk(2, dim=-1) if kind.gate else (u, None)
    u = F.silu(convolved(u, weights["conv2d.weight"], weights.get("conv2d.bias")))
    y = scanned_by_hand(mixer, u)
    if kind.out_norm == "layer norm":
        y = normed(y, "out_norm")
    elif kind.out_norm == "convolution":
        y = convolved(y, weights["out_norm.1.weight"])
    elif kind.out_norm == "layer norm and convolution":
        y = convolved(normed(y, "out_norm.0"), weights["out_norm.2.weight"])
    elif kind.out_norm == "softmax":
        y = y.exp() / y.exp().sum((1, 2), keepdim=True)
    elif kind.out_norm == "sigmoid":
        y = 1 / (1 + torch.exp(-y))
    y = F.gelu(y) if kind.out_act else y
    if z is not None:
        y = y * (F.silu(z) if kind.gate == "activated" else z)
    return y @ weights["out_proj.weight"].T


@every_backend
@pytest.mark.parametrize("name", FORWARD_TYPES)
def test_equations_of_every_forward_type(name, backend):
    mixer = layer(backend, forward_type=name)
    x = images.image(3, 5, 6, backend)
    torch.testing.assert_close(mixer(x), mixed_by_hand(mixer, x), rtol=1e-10, atol=1e-10)


@every_backend
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)], ids=str)
@pytest.mark.parametrize("scan", ["cross", "cascade"])
def test_images_of_one_row_or_column(scan, size, backend):
    mixer = layer(backend, forward_type=ForwardType(scan=scan), d_state=1)
    x = images.image(*size, 6, backend)
    torch.testing.assert_close(mixer(x), mixed_by_hand(mixer, x), rtol=1e-10, atol=1e-10)
    assert mixer(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("name", FORWARD_TYPES)
def test_published_names_are_words(name):
    assert ForwardType.parse(name) == ForwardType(**FORWARD_TYPES[name])


@pytest.mark.parametrize("name", ["v9", "v0_noz", "xv1a", "m0_noz", "v05_nox", "", "v05_noz_onnone_noz"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"forward_type {name!r} is unknown, known: v0, "):
        SS2D(forward_type=name)


@every_backend
def test_scans_that_copy_their_input_give_it_four_times(backend):
    """D = 1 and C = 0: what is left is cross scan and cross merge."""
    mixer = layer(backend, forward_type="v05_onnone_noz")
    with torch.no_grad():
        mixer.Ds.fill_(1.0)
        mixer.x_proj_weight[:, mixer.dt_rank + mixer.d_state :] = 0
    x = images.image(5, 7, mixer.d_inner, backend)
    assert torch.equal(mixer.scan(x), 4 * x)


@every_backend
def test_a_transposed_image_with_transposed_parameters_gives_the_transposed_result(backend):
    mixer, x = layer(backend), images.image(4, 7, 6, backend)
    expected = mixer(x).transpose(1, 2)
    swapped = mixer.state_dict()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        by_paths = swapped[name].unflatten(0, (4, -1)) if name in ("A_logs", "Ds") else swapped[name]
        swapped[name] = by_paths[[1, 0, 3, 2]].view_as(swapped[name])  # rows for columns
    swapped["conv2d.weight"] = swapped["conv2d.weight"].mT.clone()
    assert not torch.allclose(mixer(x.transpose(1, 2)), expected)
    mixer.load_state_dict(swapped)
    torch.testing.assert_close(mixer(x.transpose(1, 2)), expected)


@every_backend
@pytest.mark.parametrize("name", ["v0", "v04_ondwconv3_nozact", "v052dc"])
def test_gradients_reach_every_parameter(name, backend):
    images.check_gradients(layer(backend, forward_type=name), images.image(4, 5, 6, backend))


def test_channels_first_is_the_same_without_a_copy():
    first, last = layer(channel_first=True), layer()
    x = images.image(4, 5, 6)
    y = first(x.movedim(3, 1))
    assert torch.equal(y.movedim(1, 3), last(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(first(x.movedim(3, 1).contiguous()), y)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["v05", "v2"])
def test_low_precision_and_autocast(name, dtype, backend):
    wide = layer(backend, torch.float32, forward_type=name)
    low = SS2D(**(SMALL | {"forward_type": name}), dtype=dtype, backend=backend)
    images.check_low_precision(wide, low, dtype, images.image(5, 6, 6))


@pytest.mark.parametrize("name", ["v05_noz", "v052dc"])
def test_compiles_to_one_graph(name):
    images.check_compile(layer(forward_type=name), images.image(4, 5, 6))


def test_an_official_state_dict_has_these_names():
    rank, inner = 6, 192
    paths = {
        "x_proj_weight": (4, rank + 2, inner),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "A_logs": (4 * inner, 1),
        "Ds": (4 * inner,),
    }
    released = paths | {
        "in_proj.weight": (inner, 96),
        "conv2d.weight": (inner, 1, 3, 3),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "out_proj.weight": (96, inner),
    }
    mixer = SS2D(96, d_state=1, conv_bias=False, forward_type="v05_noz", device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == released
    mixer = SS2D(96, d_state=1, forward_type="v0", device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == released | {
        "in_proj.weight": (2 * inner, 96),
        "conv2d.bias": (inner,),
    }


def test_weights_in_the_layouts_of_other_releases_load():
    mixer = layer()
    own = mixer.state_dict()
    other = {
        **{name: tensor for name, tensor in own.items() if not name.startswith(("x_proj", "dt_projs"))},
        "in_proj.weight": own["in_proj.weight"][:, :, None, None],
        "x_proj.weight": own["x_proj_weight"].flatten(0, 1).unsqueeze(-1),
        "dt_projs.weight": own["dt_projs_weight"].flatten(0, 1),
        "dt_projs.bias": own["dt_projs_bias"].flatten(),
    }
    fresh = SS2D(**SMALL).double()
    fresh.load_state_dict(other)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), own.values(), strict=True))
    for name, wrong in (("x_proj.weight", other["x_proj.weight"].transpose(0, 1)), ("Ds", own["Ds"].view(4, -1))):
        with pytest.raises(RuntimeError, match=name.replace(".", "_")):
            fresh.load_state_dict(other | {name: wrong})


def test_start_values():
    mixer = SS2D(64, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(mixer.dt_projs_bias)
    assert (dt >= 0.002 * (1 - 1e-5)).all()
    assert (dt <= 0.05 * (1 + 1e-5)).all()
    assert 0.4 < mixer.dt_projs_weight.abs().max() <= 0.5
    torch.testing.assert_close(mixer.A_logs.exp()[300], torch.arange(1.0, 17.0))
    assert (mixer.Ds == 1).all()
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)} == {"A_logs", "Ds"}
    assert (SS2D(64, dt_init="constant").dt_projs_weight == 0.5).all()
    normal, uniform = SS2D(64, initialize="v1"), SS2D(64, initialize="v2")
    assert 0.9 < normal.A_logs.std() < 1.1
    for drawn in (normal.dt_projs_weight, normal.dt_projs_bias):
        assert 0.08 < drawn.std() < 0.12
    assert not uniform.A_logs.any()
    for drawn in (uniform.dt_projs_weight, uniform.dt_projs_bias):
        assert drawn.min() >= 0
        assert 0.08 < drawn.max() <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"ssm_ratio": 0.01}, r"ssm_ratio \* d_model must be at least 1, got 0"),
        ({"dt_rank": "none"}, "dt_rank must be 'auto' or at least 1, got 'none'"),
        ({"d_conv": 4}, "d_conv must be odd, or below 2 for no convolution, got 4"),
        ({"dt_min": 0.2}, "step sizes need 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        ({"dt_init": "zero"}, "dt_init must be 'random' or 'constant', got 'zero'"),
        ({"initialize": "v3"}, "initialize must be 'v0', 'v1' or 'v2', got 'v3'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(**options)


@pytest.mark.parametrize("word", [{"scan": "crossed"}, {"gate": "silu"}, {"out_norm": "batch norm"}])
def test_bad_words_are_named(word):
    ((name, value),) = word.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got {value!r}"):
        ForwardType(**word)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, height, width, 6\), got \(2, 6, 5\)"):
        layer()(torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 6, height, width\), got \(2, 4, 5, 6\)"):
        layer(channel_first=True)(images.image(4, 5, 6))


def test_without_convolution():
    mixer = layer(d_conv=1)
    assert not any(name.startswith("conv2d") for name in mixer.state_dict())
    x = images.image(3, 4, 6)
    u = F.silu(x @ mixer.in_proj.weight.T)
    y = F.layer_norm(scanned_by_hand(mixer, u), (12,), mixer.out_norm.weight, mixer.out_norm.bias)
    torch.testing.assert_close(mixer(x), y @ mixer.out_proj.weight.T, rtol=1e-10, atol=1e-10)
