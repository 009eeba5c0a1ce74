"""Mamba2D backbones: sizes, official weights, feature maps, the equations of its stages, gradients, compilation."""

import pytest
import torch

from ssmkit.models import create_model, list_models
from ssmkit.models.vision.mamba2d import Mamba2DBackbone
from ssmkit.testing import available

# Millions of parameters, which three decimals of the published sizes round.
SIZES = {"mamba2d_nano": 7.178, "mamba2d_tiny": 26.523, "mamba2d_small": 50.274}
SMALL = {"n_blocks": (2, 1, 1, 1), "embed_dim": (8, 8, 12, 16), "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return Mamba2DBackbone(**(SMALL | options)).eval()


def official(model):
    """Its weights as the published Lightning checkpoints hold them."""
    outside = ("norm.", "head.")
    return {name if name.startswith(outside) else f"backbone.{name}": t for name, t in model.state_dict().items()}


def test_every_published_size_is_there():
    assert list_models("mamba2d_*") == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == SIZES[name]


def test_official_names():
    with torch.device("meta"):
        names = {name: tuple(tensor.shape) for name, tensor in official(create_model("mamba2d_nano")).items()}
    expected = {
        "backbone.ds.stem.conv.weight": (32, 3, 7, 7),
        "backbone.ds.stem.conv.bias": (32,),
        "backbone.ds.stem.post_norm.norm.weight": (32,),
        "backbone.ds.ds1.conv.weight": (64, 32, 3, 3),
        "backbone.ds.ds3.conv.bias": (256,),
        "backbone.stages.0.2.norm1.weight": (32,),
        "backbone.stages.0.2.res_scale1.scale": (32,),
        "backbone.stages.0.2.token_mixer.local_path.act2.bias": (1,),
        "backbone.stages.1.0.token_mixer.x_proj.weight": (2 * 4 + 3 * 16, 64),
        "backbone.stages.1.0.token_mixer.AT_log": (64, 16),
        "backbone.stages.1.3.bias": (64,),
        "backbone.stages.2.8.token_mixer.qkv.weight": (480, 160),
        "backbone.stages.2.8.token_mixer.k_norm.bias": (32,),
        "backbone.stages.3.0.MLP.fc1.weight": (1024, 256),
        "backbone.stages.3.3.weight": (256,),
        "norm.bias": (256,),
        "head.fc1.weight": (1024, 256),
        "head.norm.weight": (1024,),
        "head.fc2.weight": (1000, 1024),
    }
    assert expected.items() <= names.items()


@pytest.mark.parametrize("prefix", ["backbone.", "backbone._orig_mod."])
def test_official_weights_load_strictly(prefix, tmp_path):
    source, model = small(), Mamba2DBackbone(**SMALL).eval()
    file = tmp_path / "M2D-backbone.ckpt"
    state = {name.replace("backbone.", prefix): tensor for name, tensor in official(source).items()}
    torch.save({"state_dict": state, "epoch": 299, "pytorch-lightning_version": "2.5"}, file)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(x), source(x))
    model.load_official(file)
    assert torch.equal(model(x), source(x))
    with pytest.raises(ValueError, match=r"missing ds.stem.conv.bias"):
        model.load_official({name: t for name, t in state.items() if not name.endswith("stem.conv.bias")})


def test_maps_and_head_follow_the_figure():
    model, x = small(), torch.randn(2, 3, 64, 96)
    features, maps = model.forward_intermediates(x)
    for level, (info, found) in enumerate(zip(model.feature_info, maps, strict=True)):
        rows, cols = (size // info["reduction"] for size in (64, 96))
        assert found.shape == (2, info["num_chs"], rows, cols)
        assert model.get_submodule(info["module"]) is model.stages[level]
    first = model.ds["stem"].conv(x).movedim(1, -1)
    first = torch.nn.functional.layer_norm(first, (8,), *model.ds["stem"].post_norm.norm.parameters())
    first = model.stages[0][2](model.stages[0][1](model.stages[0][0](first)))
    torch.testing.assert_close(maps[0], first.movedim(-1, 1))
    second = model.stages[1](model.ds["ds1"].conv(maps[0]).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(maps[1], second)
    assert torch.equal(features, maps[-1])
    pooled = model.norm(features.flatten(2).mean(-1))
    hidden = model.head.norm(torch.nn.functional.gelu(model.head.fc1(pooled)))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), hidden)
    torch.testing.assert_close(model(x), model.head.fc2(hidden))


def test_every_second_block_starts_at_the_other_corner():
    for flipped, corners in ((True, ["TL", "BR"]), (False, ["TL", "TL"])):
        assert [block.token_mixer.scan_start for block in small(inter_flip=flipped).stages[0][:2]] == corners


@pytest.mark.parametrize("size", [(37, 51), (3, 3), (4, 70)], ids=str)
def test_images_of_odd_sizes(size):
    model = small()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    rows, cols = ((length + 1) // 4 for length in size)
    for found in maps:
        assert found.shape[2:] == (rows, cols)
        rows, cols = (rows + 1) // 2, (cols + 1) // 2
    assert torch.isfinite(maps[-1]).all()


def test_features_alone_and_another_head():
    only = create_model("mamba2d_nano", features_only=True, out_indices=(0, -1), **SMALL)
    assert [m.shape for m in only(torch.randn(1, 3, 32, 32))] == [(1, 8, 8, 8), (1, 16, 1, 1)]
    model = small()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert small(num_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features)


@pytest.mark.parametrize("backend", [name for name in available("grid_scan", reference=True) if name != "triton"])
def test_gradients_reach_every_parameter(backend):
    model = small(backend=backend, drop_path_rate=0.1, head_dropout=0.1, embed_dim=(8, 8, 8, 8)).double()
    model(torch.randn(2, 3, 24, 40, dtype=torch.float64)).square().sum().backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # What every key has in common, softmax leaves out.
    assert all(name.endswith("k_norm.bias") for name in unreached)


def test_weight_decay_spares_rates_and_skips():
    assert all(name.rpartition(".")[2] in ("AT_log", "AL_log", "D") for name in small().no_weight_decay())
    assert len(small().no_weight_decay()) == 9


def test_compile():
    model, x = small(n_blocks=(1, 1), embed_dim=(8, 8), token_mixer=("2D_local", "RopeAttention"),
                     res_scale_init_values=(1.0, None)), torch.randn(1, 3, 16, 24)  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="embed_dim must have one entry per stage, 4 like n_blocks, got 3"):
        Mamba2DBackbone(embed_dim=(8, 8, 8))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(1, 1, 8, 8\)"):
        small()(torch.zeros(1, 1, 8, 8))
