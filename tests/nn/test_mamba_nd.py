"""Mamba-ND: the published layers with permutations and flips, orders of clips, names, gradients, compilation."""

import images
import mixers
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from ssmkit.nn import MambaND, MambaNDLayer
from ssmkit.testing import device_of

BACKENDS = [
    name for name in mixers.usable("selective_scan", "causal_conv1d") if name != "triton" or torch.cuda.is_available()
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def stack(depth, backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = MambaND(8, depth, d_state=3, backend=backend, **options).eval()
    return images.perturbed(made).to(device_of(backend), dtype)


def clip(frames, height, width, backend="auto"):
    return images.image(frames * height, width, 8, backend).unflatten(1, (frames, height))


def by_permutation(model, x, orders):
    """Layer i permutes the axes, flips the sequence if i is odd, runs the plain mixer, and undoes both."""
    for index, layer in enumerate(model.layers):
        lies, walked = orders[(index // 2) % len(orders)]
        sizes = dict(zip(lies.split()[1:-1], x.shape[1:-1], strict=True))
        u = rearrange(F.layer_norm(x, (8,), layer.norm.weight, layer.norm.bias), f"{lies} -> {walked}")
        v = layer.mixer(u.flip(1)).flip(1) if index % 2 else layer.mixer(u)
        x = rearrange(u + v, f"{walked} -> {lies}", **sizes)
    return x


@every_backend
def test_layers_of_images(backend):
    model, x = stack(6, backend), images.image(3, 5, 8, backend)
    lies = "n h w c"
    expected = by_permutation(model, x, [(lies, "n (h w) c"), (lies, "n (w h) c")])
    torch.testing.assert_close(model(x), expected)


CLIPS = {
    "alternating": ({}, ["n (t h w) c", "n (t w h) c", "n (w h t) c"]),
    "frames": ({"clip_order": "frames"}, ["n (t h w) c", "n (t w h) c", "n (t h w) c"]),
    "one": ({"clip_order": "one"}, ["n (t h w) c"]),
    "hw_t": ({"factorization": "hw_t"}, ["(n t) (h w) c", "(n t) (w h) c", "n (w h t) c"]),
    "h_w_t": ({"factorization": "h_w_t"}, ["(n t h) w c", "(n t w) h c", "(n w h) t c"]),
}


@every_backend
@pytest.mark.parametrize(("options", "orders"), CLIPS.values(), ids=CLIPS)
def test_layers_of_clips(options, orders, backend):
    model, x = stack(7, backend, **options), clip(2, 3, 4, backend)
    torch.testing.assert_close(model(x), by_permutation(model, x, [("n t h w c", walked) for walked in orders]))


def test_one_layer_is_an_ordinary_one_on_normalised_tokens():
    layer, u = stack(1).layers[0], mixers.tokens()
    normalised = layer.norm(u)
    torch.testing.assert_close(layer(u), normalised + layer.mixer(normalised))
    torch.manual_seed(0)
    dropped = MambaNDLayer(8, drop=1.0).train()
    torch.testing.assert_close(dropped(u.float()), dropped.norm(u.float()))


def test_sizes_of_one_and_none():
    model = stack(7)
    assert model(clip(1, 1, 1)).shape == (2, 1, 1, 1, 8)
    assert model(clip(2, 3, 2)[:0]).shape == (0, 2, 3, 2, 8)
    frame = clip(1, 3, 4)
    torch.testing.assert_close(stack(2)(frame)[:, 0], stack(2)(frame[:, 0]))


@every_backend
def test_gradients_reach_every_parameter(backend):
    images.check_gradients(stack(6, backend, bias=True), clip(2, 3, 3, backend))


def test_an_official_state_dict_has_these_names():
    names = {name: tuple(tensor.shape) for name, tensor in MambaND(32, 2).state_dict().items()}
    layer = {
        "norm.weight": (32,),
        "norm.bias": (32,),
        "mixer.A_log": (64, 16),
        "mixer.D": (64,),
        "mixer.in_proj.weight": (128, 32),
        "mixer.conv1d.weight": (64, 1, 4),
        "mixer.conv1d.bias": (64,),
        "mixer.x_proj.weight": (34, 64),
        "mixer.dt_proj.weight": (64, 2),
        "mixer.dt_proj.bias": (64,),
        "mixer.out_proj.weight": (32, 64),
    }
    assert names == {f"layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    rates = [part.drop_path.drop_prob for part in MambaND(8, 3, drop_path_rate=0.4).layers]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_compile_fullgraph():
    images.check_compile(stack(3, dtype=torch.float32), images.image(3, 4, 8))


def test_bad_arguments():
    with pytest.raises(ValueError, match="clip_order must be one of 'alternating', 'frames', 'one', got 'thw'"):
        MambaND(8, 1, clip_order="thw")
    with pytest.raises(ValueError, match="factorization must be one of None, 'hw_t', 'h_w_t', got 'h'"):
        MambaND(8, 1, factorization="h")
    with pytest.raises(ValueError, match="factorization goes with the alternating orders of a clip"):
        MambaND(8, 1, factorization="hw_t", clip_order="one")
    with pytest.raises(ValueError, match=r"x must have shape \(batch, \[frames,\] height, width, 8\), got \(2, 3, 8\)"):
        MambaND(8, 1)(torch.randn(2, 3, 8))
