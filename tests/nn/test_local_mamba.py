"""LocalMamba's mixers: their equations token by token, windows that divide the image and that do not, names, compilation."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import BiAttn, LocalSS2D, MultiMamba
from ssmkit.testing import available, device_of

BACKENDS = [
    name for name in available("selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = {"d_model": 4, "d_state": 2, "dt_rank": 2}


def layer(made=MultiMamba, backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return images.perturbed(made(**(SMALL | options), backend=backend)).to(device_of(backend), dtype)


def walked(x, low_dt, B, C, dt_weight, dt_bias, A_log, D):
    """The scan over tokens (batch, length, dim) in the order given."""
    dt = torch.log1p(torch.exp(low_dt @ dt_weight.T + dt_bias))
    h, y = x.new_zeros(x.shape[0], x.shape[2], B.shape[2]), []
    for p in range(x.shape[1]):
        h = torch.exp(dt[:, p, :, None] * -A_log.exp()) * h + (dt[:, p] * x[:, p])[:, :, None] * B[:, p, None]
        y.append((h * C[:, p, None]).sum(-1) + D * x[:, p])
    return torch.stack(y, dim=1)


def laid_out(image, direction):
    """Tokens of (batch, height, width, channels) in the order of a direction, with zeros where it pads."""
    name = direction.removesuffix("_flip")
    if name == "v":
        image = image.transpose(1, 2)
    elif name != "h":
        side = int(name[1:])
        height, width = image.shape[1:3]
        image = F.pad(image, (0, 0, 0, -width % side, 0, -height % side))
        batch, rows, columns, dim = image.shape
        image = image.view(batch, rows // side, side, columns // side, side, dim).transpose(2, 3)
    tokens = image.reshape(image.shape[0], -1, image.shape[-1])
    return tokens.flip(1) if direction.endswith("_flip") else tokens


def put_back(tokens, direction, height, width):
    """The inverse of `laid_out`, by laying out the numbers of the places."""
    places = torch.arange(1, height * width + 1).view(1, height, width, 1)
    order = laid_out(places, direction).flatten()
    image = tokens.new_zeros(tokens.shape[0], height * width, tokens.shape[2])
    image[:, order[order > 0] - 1] = tokens[:, order > 0]
    return image


def weighed(attn, tokens):
    mean = F.layer_norm(tokens, tokens.shape[-1:], attn.norm.weight, attn.norm.bias).mean(1, keepdim=True)
    return tokens * torch.sigmoid(attn.channel_select(F.gelu(attn.global_reduce(mean))))


def multi_mamba_by_hand(mixer, u, height, width):
    xz, total = mixer.in_proj(u), 0
    middle, cls = height * width // 2, None
    if mixer.use_middle_cls_token:
        cls, xz = xz[:, middle : middle + 1], torch.cat([xz[:, :middle], xz[:, middle + 1 :]], dim=1)
    for i, direction in enumerate(mixer.directions):
        own = {name: getattr(mixer, f"{name}_{i}") for name in ("conv1d", "x_proj", "dt_proj", "A_log", "D")}
        tokens = laid_out(xz.unflatten(1, (height, width)), direction)
        if cls is not None:
            tokens = torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], dim=1)
        x, z = tokens.chunk(2, dim=2)
        x = F.silu(own["conv1d"](x.mT)[..., : x.shape[1]].mT)
        low, B, C = own["x_proj"](x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=2)
        y = walked(x, low, B, C, own["dt_proj"].weight, own["dt_proj"].bias, own["A_log"], own["D"]) * F.silu(z)
        if cls is None:
            y = put_back(y, direction, height, width)
        else:
            middle_y, y = y[:, middle : middle + 1], torch.cat([y[:, :middle], y[:, middle + 1 :]], dim=1)
            y = put_back(y, direction, height, width)
            y = torch.cat([y[:, :middle], middle_y, y[:, middle:]], dim=1)
        total = total + weighed(mixer.attn, y)
    return mixer.out_proj(total)


def local_ss2d_by_hand(mixer, u):
    height, width = u.shape[1:3]
    x, z = mixer.in_proj(u).chunk(2, dim=3)
    x, total = F.silu(mixer.conv2d(x.movedim(3, 1))).movedim(1, 3), 0
    for k, direction in enumerate(mixer.directions):
        tokens = laid_out(x, direction)
        low, B, C = (tokens @ mixer.x_proj_weight[k].T).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=2)
        A_log, D = (t.unflatten(0, (4, -1))[k] for t in (mixer.A_logs, mixer.Ds))
        y = walked(tokens, low, B, C, mixer.dt_projs_weight[k], mixer.dt_projs_bias[k], A_log, D)
        total = total + weighed(mixer.multi_scan["attn"], put_back(y, direction, height, width))
    return mixer.out_proj(mixer.out_norm(total).view(x.shape) * F.silu(z))


ROUTES = {
    "windows that divide the image": (("h", "v_flip", "w2", "w2_flip"), (4, 6)),
    "windows that do not": (("w2", "w3_flip", "v", "h_flip"), (5, 3)),
    "one cell": (("h", "v", "w2", "w7_flip"), (1, 1)),
    "one row": (("w2", "w2_flip", "w3", "v_flip"), (1, 4)),
}
every_route = pytest.mark.parametrize(("directions", "size"), ROUTES.values(), ids=ROUTES)


@every_backend
@every_route
@pytest.mark.parametrize("cls", [False, True], ids=["image", "class token"])
def test_equations_of_the_mixer_of_tokens(directions, size, cls, backend):
    mixer = layer(backend=backend, directions=directions, use_middle_cls_token=cls, bias=True)
    u = torch.cat([images.image(*size, 4, backend).flatten(1, 2), images.image(1, 1, 4, backend).flatten(1, 2)], dim=1)
    u = u if cls else u[:, :-1]
    expected = multi_mamba_by_hand(mixer, u, *size)
    torch.testing.assert_close(mixer(u, size), expected, rtol=1e-10, atol=1e-10)


@every_backend
@every_route
def test_equations_of_the_mixer_of_images(directions, size, backend):
    mixer, u = layer(LocalSS2D, backend, directions=directions), images.image(*size, 4, backend)
    torch.testing.assert_close(mixer(u), local_ss2d_by_hand(mixer, u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0]).shape == u[:0].shape


@every_backend
def test_gradients_reach_every_parameter(backend):
    directions = ("h", "v_flip", "w2", "w3_flip")
    mixer = layer(backend=backend, directions=directions, token_size=(3, 4))
    images.check_gradients(mixer, images.image(3, 4, 4, backend).flatten(1, 2))
    images.check_gradients(layer(LocalSS2D, backend, directions=directions), images.image(3, 4, 4, backend))


def test_the_gate_of_images_is_that_of_their_tokens():
    torch.manual_seed(0)
    attn, x = images.perturbed(BiAttn(8)).double(), images.image(3, 4, 8)
    expected = weighed(attn, x.flatten(1, 2))
    torch.testing.assert_close(attn(x).flatten(1, 2), expected)
    torch.testing.assert_close(attn(x.flatten(1, 2)), expected)
    with pytest.raises(ValueError, match=r"act_ratio \* in_channels must be at least 1, got 0.125 \* 7"):
        BiAttn(7)


def test_low_precision_and_autocast():
    x = images.image(5, 6, 4)
    options = SMALL | {"directions": ("h", "v_flip", "w2", "w3")}
    low = LocalSS2D(**options, dtype=torch.bfloat16)
    images.check_low_precision(layer(LocalSS2D, dtype=torch.float32, **options), low, torch.bfloat16, x)
    options["token_size"] = (5, 6)
    low = MultiMamba(**options, dtype=torch.bfloat16)
    images.check_low_precision(layer(dtype=torch.float32, **options), low, torch.bfloat16, x.flatten(1, 2))


def test_compiles_to_one_graph():
    x = images.image(3, 4, 4)
    images.check_compile(layer(directions=("w3_flip",), token_size=(3, 4)), x.flatten(1, 2))
    images.check_compile(layer(LocalSS2D, directions=("h", "v_flip", "w2", "w2_flip")), x)


def test_official_state_dicts_have_these_names():
    attn = {
        "norm.weight": (384,),
        "norm.bias": (384,),
        "global_reduce.weight": (48, 384),
        "global_reduce.bias": (48,),
        "channel_select.weight": (384, 48),
        "channel_select.bias": (384,),
    }
    own = {
        "A_log": (384, 16),
        "D": (384,),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "x_proj.weight": (44, 384),
        "dt_proj.weight": (384, 12),
        "dt_proj.bias": (384,),
    }
    numbered = {
        f"{name.split('.')[0]}_{i}{name.removeprefix(name.split('.')[0])}": shape
        for name, shape in own.items()
        for i in range(4)
    }
    mixer = MultiMamba(192, directions=("h", "v_flip", "w7", "w7_flip"), device="meta")
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == {
        "in_proj.weight": (768, 192),
        "out_proj.weight": (192, 384),
        **numbered,
        **{f"attn.{name}": shape for name, shape in attn.items()},
    }
    names = LocalSS2D(192, device="meta").state_dict()
    assert {f"multi_scan.attn.{name}" for name in attn} <= names.keys()
    others = {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
    assert {name.split(".")[0] for name in names} == others | {
        "in_proj",
        "conv2d",
        "out_norm",
        "out_proj",
        "multi_scan",
    }


@pytest.mark.parametrize("direction", ["w0", "w", "d", "h_back", "w2_flip_flip", ""])
def test_unknown_directions_are_named(direction):
    with pytest.raises(ValueError, match=f"directions must be h .* got {direction!r}"):
        MultiMamba(4, directions=("h", direction))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="directions must name 4, got 2"):
        LocalSS2D(4, directions=("h", "v"))
    with pytest.raises(ValueError, match="directions must name at least one, got none"):
        MultiMamba(4, directions=())
    with pytest.raises(ValueError, match="d_conv must be at least 1, got 0"):
        MultiMamba(4, d_conv=0)
    mixer = MultiMamba(**SMALL, use_middle_cls_token=True)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, 7, 4\) for token_size \(2, 3\), got"):
        mixer(torch.zeros(1, 6, 4), (2, 3))
