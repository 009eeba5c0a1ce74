"""VMamba: sizes, weights of every release, feature maps, the equations between its blocks, any resolution, compilation."""

import pytest
import torch
import torch.nn.functional as F

from ssmkit.models import create_model, list_models
from ssmkit.models.vision import VMamba
from ssmkit.testing import available

# Millions of parameters, which three decimals of the published sizes round.
SIZES = {
    "vanilla_vmamba_tiny": 22.893,
    "vanilla_vmamba_small": 44.417,
    "vanilla_vmamba_base": 76.254,
    "vmamba_tiny_s2l5": 30.706,
    "vmamba_small_s2l15": 50.148,
    "vmamba_base_s2l15": 88.558,
    "vmamba_tiny_s1l8": 30.249,
    "vmamba_small_s1l20": 49.013,
    "vmamba_base_s1l20": 86.615,
}
FIRST, LATER = "vanilla_vmamba_tiny", "vmamba_tiny_s1l8"
SMALL = {"depths": (1, 2, 1), "dims": 8, "num_classes": 5}
BACKENDS = [
    name for name in available("cross_selective_scan", reference=True) if name != "triton" or torch.cuda.is_available()
]


def small(name=LATER, **options):
    torch.manual_seed(0)
    return create_model(name, **(SMALL | options)).eval()


def image(height=37, width=50, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_every_published_size_is_there():
    assert list_models("*vmamba*") == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    model = create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == SIZES[name]


def test_official_names():
    def names(name):
        return {key: tuple(t.shape) for key, t in create_model(name, device="meta").state_dict().items()}

    both = {
        "layers.1.blocks.1.op.x_proj_weight",
        "layers.1.blocks.1.op.dt_projs_weight",
        "layers.1.blocks.1.op.dt_projs_bias",
        "layers.1.blocks.1.op.A_logs",
        "layers.1.blocks.1.op.Ds",
        "layers.1.blocks.1.op.out_norm.weight",
    }
    first = {
        "patch_embed.0.weight": (96, 3, 4, 4),
        "patch_embed.2.bias": (96,),
        "layers.0.blocks.0.norm.weight": (96,),
        "layers.0.blocks.0.op.in_proj.weight": (384, 96),
        "layers.0.blocks.0.op.conv2d.bias": (192,),
        "layers.2.blocks.8.op.out_proj.weight": (384, 768),
        "layers.2.downsample.norm.weight": (1536,),
        "layers.2.downsample.reduction.weight": (768, 1536),
        "classifier.norm.weight": (768,),
        "classifier.head.bias": (1000,),
    }
    later = {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.2.weight": (48,),
        "patch_embed.5.weight": (96, 48, 3, 3),
        "patch_embed.7.bias": (96,),
        "layers.0.blocks.0.op.in_proj.weight": (96, 96),
        "layers.0.blocks.0.norm2.weight": (96,),
        "layers.2.blocks.7.mlp.fc1.weight": (1536, 384),
        "layers.2.blocks.7.mlp.fc2.bias": (384,),
        "layers.2.downsample.1.weight": (768, 384, 3, 3),
        "layers.2.downsample.3.bias": (768,),
        "classifier.head.weight": (1000, 768),
    }
    for name, expected in ((FIRST, first), (LATER, later)):
        found = names(name)
        assert both <= found.keys()
        assert expected.items() <= found.items()
    assert not any(name.startswith("layers.3.downsample") or name.endswith("conv2d.bias") for name in names(LATER))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_weights_of_the_first_release_load(tmp_path):
    """Under the names of its training code, and under those of the last release."""
    source = small(FIRST)
    renames = {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        ".norm.": ".ln_1.",
        ".op.": ".self_attention.",
        "classifier.norm.": "norm.",
        "classifier.head.": "head.",
    }
    state = {}
    for name, tensor in source.state_dict().items():
        block = ".blocks." in name
        for new, old in renames.items():
            name = name.replace(new, old) if block == new.startswith(".") else name
        state[name] = tensor
    assert "layers.0.blocks.0.self_attention.out_norm.weight" in state
    assert {"norm.weight", "layers.0.blocks.0.ln_1.bias", "layers.0.downsample.norm.weight"} <= state.keys()
    torch.save({"model": state, "epoch": 292}, tmp_path / "vssmtiny.pth")
    model = create_model(FIRST, **SMALL, checkpoint_path=tmp_path / "vssmtiny.pth")
    assert same(model, source)

    merging = {".downsample.norm.": ".downsample.1.", ".downsample.reduction.": ".downsample.2."}
    state = source.state_dict()
    for new, old in merging.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    model = create_model(FIRST, **SMALL)
    model.load_official(state)
    assert same(model, source)


def test_weights_of_the_later_releases_load():
    """As released, and with projections as 1 x 1 convolutions and paths laid end to end."""
    source, model = small(), small()
    other = {}
    for name, tensor in source.state_dict().items():
        if name.endswith(("in_proj.weight", "fc1.weight")):
            tensor = tensor[:, :, None, None]
        elif name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, tensor = name.replace("_weight", ".weight"), tensor.flatten(0, 1)
        other[name] = tensor
    for state in (source.state_dict(), other):
        torch.nn.init.zeros_(model.classifier.head.weight)
        model.load_official({"model_ema": {f"module.{name}": tensor for name, tensor in state.items()}})
        assert same(model, source)
    x = image()
    assert torch.equal(small(norm_layer="ln")(x), model(x))  # channels last and first are one
    with pytest.raises(ValueError, match=r"missing classifier.head.bias; unknown odd"):
        model.load_official({k: v for k, v in other.items() if k != "classifier.head.bias"} | {"odd": torch.ones(1)})


def test_the_dense_backbone_takes_its_own_weights_and_those_of_a_classifier():
    classifier = small()
    dense = small(num_classes=0, out_norms=(0, 2))
    names = dense.state_dict().keys()
    assert {"outnorm0.weight", "outnorm0.bias", "outnorm2.weight", "outnorm2.bias"} <= names
    assert not any(name.startswith("classifier") for name in names)
    with torch.no_grad():
        dense.outnorm0.weight.fill_(2.0)
    dense.load_official(classifier.state_dict())
    x = image()
    plain, normed = classifier.forward_intermediates(x, intermediates_only=True), dense.forward_intermediates(x)[1]
    expected = F.layer_norm(plain[0].movedim(1, -1), (8,), 2 * torch.ones(8)).movedim(-1, 1)
    torch.testing.assert_close(normed[0], expected)
    torch.testing.assert_close(normed[1], plain[1])
    assert [info["module"] for info in dense.feature_info] == ["outnorm0", "layers.1.blocks", "outnorm2"]
    other = small(num_classes=0, out_norms=(0, 2))
    detector = {f"backbone.{name}": tensor for name, tensor in dense.state_dict().items()}
    other.load_official({"state_dict": detector | {"neck.convs.0.weight": torch.ones(1)}, "meta": {"epoch": 12}})
    assert same(other, dense)
    torch.testing.assert_close(dense(x), normed[2].mean((2, 3)))


@pytest.mark.parametrize("name", [FIRST, LATER])
@pytest.mark.parametrize("size", [(64, 96), (37, 50), (5, 4)], ids=str)
def test_images_of_any_size_give_maps_of_every_level(size, name):
    model = small(name)
    features, maps = model.forward_intermediates(image(*size))
    for level, (info, found) in enumerate(zip(model.feature_info, maps, strict=True)):
        # Patch merging pads, strided convolutions of 3 x 3 with padding round up too; the first patches do not.
        first = [-(-s // 4) if name == LATER else s // 4 for s in size]
        assert found.shape == (2, info["num_chs"], *(-(-s // 2**level) for s in first))
        assert info["num_chs"] == 8 * 2**level
        assert info["reduction"] == 4 * 2**level
        assert model.get_submodule(info["module"]) is model.layers[level].blocks
    assert features.shape == maps[-1].shape
    assert model.forward_head(features).shape == (2, 5)
    only = small(name, features_only=True, out_indices=(-1, 0))
    for found, level in zip(only(image(*size)), (-1, 0), strict=True):
        torch.testing.assert_close(found, maps[level])


def test_first_release_by_its_equations():
    model, x = small(FIRST, depths=(1, 1)), image(20, 28)
    tokens = model.patch_embed[0](x).movedim(1, 3)
    tokens = model.layers[0].blocks(F.layer_norm(tokens, (8,)))  # 5 x 7: merging pads both
    padded = torch.zeros(2, 6, 8, 8)
    padded[:, :5, :7] = tokens
    corners = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    tokens = F.layer_norm(torch.cat(corners, dim=3), (32,)) @ model.layers[0].downsample.reduction.weight.T
    pooled = F.layer_norm(model.layers[1].blocks(tokens), (16,)).mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.classifier.head.weight.T)


@pytest.mark.parametrize(("version", "side"), [("v2", 2), ("v3", 3)])
def test_later_releases_by_their_equations(version, side):
    model, x = small(depths=(1, 1), downsample_version=version), image(20, 28)
    first, second = model.patch_embed[0], model.patch_embed[5]
    tokens = F.conv2d(x, first.weight, first.bias, stride=2, padding=1).movedim(1, 3)
    tokens = F.gelu(F.layer_norm(tokens, (4,))).movedim(3, 1)
    tokens = F.conv2d(tokens, second.weight, second.bias, stride=2, padding=1).movedim(1, 3)
    tokens = model.layers[0].blocks(F.layer_norm(tokens, (8,))).movedim(3, 1)
    shrink = model.layers[0].downsample[1]
    assert shrink.weight.shape == (16, 8, side, side)
    tokens = F.conv2d(tokens, shrink.weight, shrink.bias, stride=2, padding=side // 3).movedim(1, 3)
    pooled = F.layer_norm(model.layers[1].blocks(F.layer_norm(tokens, (16,))), (16,)).mean((1, 2))
    torch.testing.assert_close(model(x), pooled @ model.classifier.head.weight.T)


def test_stochastic_depth_grows_to_the_last_block():
    model = small(depths=(2, 2, 3), drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    torch.testing.assert_close(rates, [0.05 * index for index in range(7)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_parameter(backend):
    for name in (FIRST, LATER):
        model = small(name, backend=backend)
        model(image()).square().sum().backward()
        idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle


def test_start_values():
    model = small(FIRST, dims=64)
    assert 0.015 < model.layers[0].blocks[0].op.in_proj.weight.std() < 0.025
    assert not model.classifier.head.bias.any()
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith(("A_logs", "Ds"))}


def test_compile():
    model, x = small(depths=(1, 1)), image(20, 28)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_layer": "bn"}, "norm_layer must be one of 'ln', 'ln2d', got 'bn'"),
        ({"downsample_version": "v4"}, "downsample_version must be one of 'v1', 'v2', 'v3', got 'v4'"),
        ({"patchembed_version": "v3"}, "patchembed_version must be one of 'v1', 'v2', got 'v3'"),
        ({"dims": (8, 16)}, "dims must hold one width for each of 4 stages, got 2"),
        ({"out_norms": (1,)}, "num_classes must be 0, got 1000"),
        ({"out_norms": (4,), "num_classes": 0}, r"out_norms must hold levels -4..3, got \(4,\)"),
        ({"patchembed_version": "v2", "patch_size": 3}, "patch_size must be even with patchembed_version 'v2', got 3"),
        ({"forward_type": "v7"}, "forward_type 'v7' is unknown"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VMamba(**options)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(2, 1, 8, 8\)"):
        small()(torch.randn(2, 1, 8, 8))
