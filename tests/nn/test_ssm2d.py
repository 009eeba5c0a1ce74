"""SSM2D: the published layer written out, tokens and images, corners, start values, a ViT block."""

import images
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkit.nn import SSM2D
from ssmkit.testing import available, device_of

BACKENDS = [name for name in available("ssm2d_kernel", reference=True) if name != "triton" or torch.cuda.is_available()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
VARIANTS = {
    "plain": {},
    "two corners": {"directions_amount": 2},
    "several models": {"n_ssm": 3, "use_residual_inside_ssm": True},
    "complex": {"complex_ssm": True, "n_ssm": 2, "normalize": True, "directions_amount": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def layer(backend="auto", dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = SSM2D(**({"embed_dim": 6, "L": 20, "ndim": 3} | options), backend=backend)
    return images.perturbed(made).to(device_of(backend), dtype)


def kernels_by_hand(mixer):
    """The kernels (rows, cols, directions * channels) by the published program: the recurrence, then the borders."""
    weights = dict(mixer.named_parameters())
    if mixer.is_complex:
        A = [
            torch.polar(weights[f"A_radius.A_{k}"].sigmoid(), 2 * torch.pi * weights[f"A_angle.A_{k}"].sigmoid())
            for k in range(1, 5)
        ]
        B = [torch.view_as_complex(weights[f"B_{k}"].sigmoid()) for k in (1, 2)]
        C = [torch.view_as_complex(weights[f"C_{k}"]) for k in (1, 2)]
    else:
        A = [weights[f"A.A_{k}"].sigmoid() for k in range(1, 5)]
        B = [weights[f"B_{k}"].sigmoid() for k in (1, 2)]
        C = [weights[f"C_{k}"] for k in (1, 2)]
    side, group = mixer.one_side_length, torch.arange(len(C[0])) % len(A[0])
    zero, h, v = torch.zeros_like(B[0]), {}, {}
    K = torch.zeros(side, side, len(C[0]), dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            h_left, v_left = h.get((i, j - 1), zero), v.get((i, j - 1), zero)
            h_above, v_above = h.get((i - 1, j), zero), v.get((i - 1, j), zero)
            halved = (h_left.any() and v_left.any(), h_above.any() and v_above.any())
            h[i, j] = (0.5 if halved[0] else 1.0) * (A[0] * h_left + A[1] * v_left) + (0 if i or j else B[0])
            v[i, j] = (0.5 if halved[1] else 1.0) * (A[2] * h_above + A[3] * v_above) + (0 if i or j else B[1])
            y = (C[0] * h[i, j][group] + C[1] * v[i, j][group]).sum(-1) * mixer.ndim**-0.5
            K[i, j] = y.real if mixer.is_complex else y
    K[0, :] *= 2
    K[:, 0] *= 2
    K[0, 0] /= 4
    return K


def filtered_by_hand(mixer, x):
    """Flip, convolve causally, flip back, for each direction; with torch's own convolution."""
    weights = dict(mixer.named_parameters())
    dirs, dim = mixer.directions_amount, mixer.embed_dim
    kernels = kernels_by_hand(mixer).permute(2, 0, 1).unflatten(0, (dirs, 1, dim)).movedim(2, 1)
    y = weights["omega"] * x if mixer.use_residual else torch.zeros_like(x)
    flips = [[], [1], [2], [1, 2]] if dirs == 4 else [[], [1, 2]]
    for kernel, axes in zip(kernels, flips, strict=True):
        pads = [kernel.shape[-1] - 1, 0] * 2
        before = F.pad(x.flip(axes).movedim(-1, 1), pads)
        y = y + F.conv2d(before, kernel.flip([-2, -1]), groups=dim).movedim(1, -1).flip(axes)
    if "normalization.weight" in weights:
        y = F.layer_norm(y, (dim,), weights["normalization.weight"], weights["normalization.bias"])
    return y


@every_backend
@variants
@pytest.mark.parametrize("size", [(5, 4), (3, 7), (1, 1), (1, 6)], ids=str)
@torch.no_grad()
def test_equations(size, options, backend):
    mixer = layer(backend, **options)
    u = images.image(*size, 6, backend)
    torch.testing.assert_close(mixer(u), filtered_by_hand(mixer.cpu(), u.cpu()).to(u), rtol=1e-10, atol=1e-10)
    assert mixer(u[:0].cpu()).shape == u[:0].shape


def test_tokens_are_images_by_rows():
    mixer = layer(num_prefix_tokens=2)
    image = images.image(3, 3, 6)
    prefix = images.image(1, 2, 6, seed=5).squeeze(1)
    tokens = torch.cat([prefix, image.flatten(1, 2)], dim=1)
    expected = mixer(image).flatten(1, 2)
    torch.testing.assert_close(mixer(tokens)[:, 2:], expected)
    assert torch.equal(mixer(tokens)[:, :2], prefix)
    wide = images.image(2, 5, 6)
    torch.testing.assert_close(layer()(wide.flatten(1, 2), size=(2, 5)), layer()(wide).flatten(1, 2))


@every_backend
@pytest.mark.parametrize("options", [VARIANTS["several models"], VARIANTS["complex"]], ids=["real", "complex"])
def test_gradients_reach_every_parameter(options, backend):
    idle = () if options.get("use_residual_inside_ssm") else ("omega",)
    x = images.image(4, 5, 6, backend)
    mixer = layer(backend, **options)
    if idle:  # as in the official layer, it is there without effect
        mixer.omega.requires_grad_(False)
        mixer.register_parameter("omega", None)
    images.check_gradients(mixer, x)


def test_one_model_per_channel_leaves_no_channel_to_another():
    """The states of group k mod G make kernel k: those of a group reach no other kernel."""
    mixer = layer(n_ssm=3, directions_amount=2)
    before = mixer.kernel().flatten(0, 1)
    with torch.no_grad():
        mixer.A["A_1"][4] += 1.0
    changed = (mixer.kernel().flatten(0, 1) - before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [k for k in range(12) if k % 6 == 4]


def test_a_larger_image_sees_zeros_beyond_the_kernel():
    mixer = layer(L=4, directions_amount=2)
    with torch.no_grad():
        impulse = torch.zeros(1, 9, 9, 6, dtype=torch.float64)
        impulse[0, 4, 4] = 1.0
        y = mixer(impulse)[0].abs().sum(-1)
    reached = {tuple(cell) for cell in (y > 1e-12).nonzero().tolist()}
    ahead = {(i, j) for i in (4, 5) for j in (4, 5)}
    assert reached == ahead | {(8 - i, 8 - j) for i, j in ahead}


def test_start_values_and_names():
    torch.manual_seed(0)
    mixer = SSM2D(64, L=30, ndim=16, n_ssm=2)
    assert mixer.one_side_length == 6 and mixer.kernel().shape == (4, 64, 6, 6)
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == {
        **{f"A.A_{k}": (8, 16) for k in range(1, 5)},
        "B_1": (8, 16),
        "B_2": (8, 16),
        "C_1": (256, 16),
        "C_2": (256, 16),
        "omega": (64,),
    }
    assert mixer.C_1.std().sub(1).abs() < 0.05 and mixer.A["A_2"].std().sub(0.2).abs() < 0.05
    assert mixer.B_1._no_weight_decay and not hasattr(mixer.A["A_1"], "_no_weight_decay")
    wide = SSM2D(64, complex_ssm=True, directions_amount=2, normalize=True)
    assert {name: tuple(tensor.shape) for name, tensor in wide.state_dict().items()} == {
        **{f"{part}.A_{k}": (2, 16) for part in ("A_angle", "A_radius") for k in range(1, 5)},
        "B_1": (2, 16, 2),
        "B_2": (2, 16, 2),
        "C_1": (128, 16, 2),
        "C_2": (128, 16, 2),
        "omega": (64,),
        "normalization.weight": (64,),
        "normalization.bias": (64,),
    }
    for parameter in (*wide.A_angle.values(), *wide.A_radius.values()):
        assert ((parameter >= 0.5) & (parameter <= 3)).all()


def test_parameters_of_the_published_size():
    """ViT of the paper: (4 + 2) G N + 2 D dirs N + D numbers."""
    mixer = SSM2D(192, L=64, ndim=16, n_ssm=8, device="meta")
    groups = 4 * 8
    assert sum(p.numel() for p in mixer.parameters()) == 6 * groups * 16 + 2 * 192 * 4 * 16 + 192


def test_in_a_vit_block():
    """Before queries, keys and values, the class token left out."""

    class Attention(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.heads = nn.MultiheadAttention(dim, 2, batch_first=True)

        def forward(self, x):
            return self.heads(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    norm, attention = nn.LayerNorm(6), Attention(6)
    mixer = SSM2D(6, L=9, ndim=3, num_prefix_tokens=1)
    block = nn.Sequential(norm, nn.Sequential(mixer, attention))
    tokens = torch.randn(2, 10, 6)
    normed = norm(tokens)
    seen = torch.cat([normed[:, :1], mixer(normed[:, 1:].unflatten(1, (3, 3))).flatten(1, 2)], dim=1)
    torch.testing.assert_close(block(tokens), attention(seen))


def test_low_precision():
    make = {"embed_dim": 6, "L": 20, "ndim": 3}
    wide = layer(dtype=torch.float32, use_residual_inside_ssm=True)
    low = SSM2D(**make, use_residual_inside_ssm=True, dtype=torch.bfloat16)
    images.check_low_precision(wide, low, torch.bfloat16, images.image(4, 5, 6))


@variants
def test_compile(options):
    mixer = layer(dtype=torch.float32, **options)
    if not mixer.use_residual:
        mixer.register_parameter("omega", None)
    images.check_compile(mixer, images.image(4, 5, 6))


BAD = {
    "no channels": ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
    "models that do not divide": ({"n_ssm": 4}, "n_ssm must divide embed_dim 6, got 4"),
    "three directions": ({"directions_amount": 3}, "directions_amount must be 2 or 4, got 3"),
    "negative prefix": ({"num_prefix_tokens": -1}, "num_prefix_tokens must be at least 0, got -1"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_bad_inputs():
    mixer = layer()
    for x, size, message in (
        (torch.zeros(2, 3, 4, 5), None, r"x must have shape \(2, 3, 4, 6\)"),
        (torch.zeros(2, 6), None, r"x must have shape \(batch, seqlen, embed_dim\), got \(2, 6\)"),
        (torch.zeros(2, 7, 6), None, r"x has 7 tokens, which size 2 x 2 does not hold; give size=\(rows, cols\)"),
        (torch.zeros(2, 3, 4, 6), (3, 4), r"size is for tokens: x has its own, \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(x, size)
