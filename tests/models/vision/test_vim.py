"""Vim backbones: sizes, official weights, the equations of the stack, positions, feature maps, gradients, compilation."""

import re

import pytest
import torch
import torch.nn.functional as F

from ssmkit.models import create_model, list_models
from ssmkit.models.vision import Vim

# Millions of parameters, which three decimals of the published sizes round.
SIZES = {
    "vim_tiny": 7.148,
    "vim_small": 25.797,
    "vim_base": 97.598,
    "vim_tiny_stride8": 7.250,
    "vim_small_stride8": 26.001,
    "vim_base_stride8": 98.008,
}
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
SMALL = {"img_size": 20, "patch_size": 4, "depth": 3, "embed_dim": 8, "d_state": 3, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return Vim(**(SMALL | options)).eval()


def test_every_published_size_is_there():
    names = list_models("vim_*")
    assert set(SIZES) <= set(names)
    assert TINY in names
    assert TINY.replace("patch16", "patch16_stride8").replace("tiny", "small") in names
    assert "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2" in names
    assert len(names) == len(SIZES) + 5


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == SIZES[name]


def test_official_names():
    with torch.device("meta"):
        names = {name: tuple(tensor.shape) for name, tensor in create_model(TINY).state_dict().items()}
    assert {re.sub(r"layers\.\d+", "layers", name) for name in names} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias",
        "norm_f.weight", "layers.norm.weight",
        *(f"layers.mixer.{name}" for name in ("in_proj.weight", "out_proj.weight")),
        *(f"layers.mixer.A{s}_log" for s in ("", "_b")), *(f"layers.mixer.D{s}" for s in ("", "_b")),
        *(f"layers.mixer.{name}{s}.{kind}" for s in ("", "_b") for name in ("conv1d", "dt_proj")
          for kind in ("weight", "bias")),
        *(f"layers.mixer.x_proj{s}.weight" for s in ("", "_b")),
    }  # fmt: skip
    assert {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "layers.23.mixer.in_proj.weight": (768, 192),
        "layers.0.mixer.conv1d_b.weight": (384, 1, 4),
        "layers.7.mixer.x_proj_b.weight": (44, 384),
        "layers.7.mixer.dt_proj.weight": (384, 12),
        "layers.7.mixer.A_b_log": (384, 16),
        "head.weight": (1000, 192),
    }.items() <= names.items()


def test_official_weights_load_strictly(tmp_path):
    source, model = small(), small()
    torch.nn.init.normal_(model.head.weight)
    file = tmp_path / "vim_t_midclstok.pth"
    torch.save({"model": source.state_dict(), "epoch": 299}, file)
    x = torch.randn(1, 3, 20, 20)
    assert not torch.equal(model(x), source(x))
    model.load_official(file)
    assert torch.equal(model(x), source(x))
    with pytest.raises(ValueError, match=r"missing layers\.1\.mixer\.A_b_log"):
        model.load_official({n: t for n, t in source.state_dict().items() if n != "layers.1.mixer.A_b_log"})
    with pytest.raises(ValueError, match=r"unknown rope\.freqs_cos"):
        model.load_official(source.state_dict() | {"rope.freqs_cos": torch.ones(25, 8)})


@pytest.mark.parametrize("options", [{}, {"if_divide_out": False, "use_middle_cls_token": False, "rms_norm": False}])
def test_the_stack_is_one_of_plain_residual_blocks(options):
    model, x = small(**options).double(), torch.randn(2, 3, 20, 12).double()
    tokens = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4).flatten(2).mT
    at = 0 if options else 15 // 2
    rows = model.pos_embed[:, [i for i in range(26) if i != (0 if options else 12)]].unflatten(1, (5, 5))
    rows = F.interpolate(rows.movedim(-1, 1).float(), (5, 3), mode="bicubic").flatten(2).mT.double()
    token = (model.cls_token + model.pos_embed[:, [0 if options else 12]]).expand(2, -1, -1)
    stream = torch.cat(((tokens + rows)[:, :at], token, (tokens + rows)[:, at:]), dim=1)

    def norm(layer, v):
        if options:
            return F.layer_norm(v, (8,), layer.weight, layer.bias, 1e-5)
        return F.rms_norm(v, (8,), layer.weight, 1e-5)

    outputs = []
    for block in model.layers:
        outputs.append(block.mixer(norm(block.norm, stream)))
        stream = stream + outputs[-1]
    expected = norm(model.norm_f, stream)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(model(x), model.head(expected[:, at]))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected[:, at])
    for found, output in zip(maps, outputs, strict=True):
        patches = output[:, [i for i in range(16) if i != at]]
        torch.testing.assert_close(found, patches.mT.unflatten(2, (5, 3)))


def test_without_a_class_token():
    model, x = small(if_cls_token=False), torch.randn(2, 3, 20, 20)
    features = model.forward_features(x)
    assert features.shape == (2, 25, 8)
    torch.testing.assert_close(model(x), model.head(features.mean(1)))
    last = small(if_cls_token=False, final_pool_type="none", num_classes=0)
    torch.testing.assert_close(last(x), last.forward_features(x)[:, -1])
    # Weights of a classifier: its head and its class token are left out, with the position of the latter.
    source = small()
    last.load_official(source.state_dict())
    kept = torch.cat((source.pos_embed[:, :12], source.pos_embed[:, 13:]), dim=1)
    assert torch.equal(last.pos_embed, kept)


def test_weights_for_images_of_another_size():
    source, model = small(), small(img_size=36)
    model.load_official(source.state_dict())
    assert model.pos_embed.shape == (1, 82, 8)
    assert torch.equal(model.pos_embed[:, 40], source.pos_embed[:, 12])
    x = torch.randn(1, 3, 36, 36)
    torch.testing.assert_close(model(x), source(x))
    strided = small(stride=2)
    strided.load_official(source.state_dict())
    assert strided.pos_embed.shape == (1, 82, 8)
    assert strided(torch.randn(1, 3, 20, 20)).shape == (1, 5)
    with pytest.raises(ValueError, match="pos_embed has 25 tokens, not those of a square image"):
        small(img_size=36).load_official(source.state_dict() | {"pos_embed": source.pos_embed[:, 1:]})


@pytest.mark.parametrize("size", [(37, 51), (4, 4), (5, 70)], ids=str)
def test_images_of_odd_sizes(size):
    model = small(depth=4, stride=3)
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for info, found in zip(model.feature_info, maps, strict=True):
        assert found.shape == (1, info["num_chs"], *((length - 4) // info["reduction"] + 1 for length in size))
    assert torch.isfinite(maps[-1]).all()


def test_features_alone_and_another_head():
    only = create_model("vim_tiny", features_only=True, out_indices=(0, -1), **SMALL | {"depth": 4})
    assert [m.shape for m in only(torch.randn(1, 3, 20, 20))] == [(1, 8, 5, 5), (1, 8, 5, 5)]
    with torch.device("meta"):
        assert [info["module"] for info in create_model("vim_tiny").feature_info] == [
            "layers.5",
            "layers.11",
            "layers.17",
            "layers.23",
        ]
    assert [info["module"] for info in small(feature_blocks=(2, 0)).feature_info] == ["layers.0", "layers.2"]
    model = small()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 20, 20)).shape == (2, 7)


def test_start_values_and_weight_decay():
    torch.manual_seed(0)
    model = Vim(**SMALL | {"embed_dim": 32})
    for block in model.layers:
        dt = F.softplus(block.mixer.dt_proj.bias)
        assert dt.min() >= 1e-4 and dt.max() <= 0.1 * (1 + 1e-5)
        assert not block.mixer.dt_proj_b.bias.any()
        assert 0.9 / (192**0.5) < block.mixer.out_proj.weight.abs().max() <= 1 / (192**0.5)
    assert 0.8 < model.patch_embed.proj.weight.std() * 48**0.5 < 1.2
    assert not model.patch_embed.proj.bias.any()
    spared = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_b_log", "layers.2.mixer.D_b"} <= spared
    assert "layers.0.mixer.in_proj.weight" not in spared


def test_stochastic_depth_grows_to_the_last_block():
    model = small(drop_path_rate=0.3)
    assert [part.drop_prob for part in model.drop_paths] == pytest.approx([0.0, 0.15, 0.3])
    # With the last block always dropped, what it and its predecessor's drop leave is the stream before it.
    gone, x = small(drop_path_rate=1.0).train(), torch.randn(2, 3, 20, 20)
    gone.drop_paths[1].drop_prob = 0.0
    shorter = small(depth=2)
    shorter.load_official({n: t for n, t in gone.state_dict().items() if not n.startswith("layers.2")})
    torch.testing.assert_close(gone(x), shorter(x))


@pytest.mark.parametrize("recomputed", [0, 2])
def test_backward_reaches_every_parameter(recomputed):
    x, grads = torch.randn(2, 3, 20, 20), []
    for count in (0, recomputed):
        model = small(checkpoint_num=count, drop_path_rate=0.0).train()
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert all(grad.any() for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_residuals_stay_in_fp32():
    model = small(dtype=torch.bfloat16)
    assert model.layers[0](torch.randn(1, 5, 8).bfloat16())[1].dtype == torch.float32
    assert model(torch.randn(1, 3, 20, 20).bfloat16()).dtype == torch.bfloat16
    low = small(dtype=torch.bfloat16, residual_in_fp32=False)
    assert low.layers[0](torch.randn(1, 5, 8).bfloat16())[1].dtype == torch.bfloat16
    assert torch.isfinite(low(torch.randn(1, 3, 20, 20).bfloat16())).all()


def test_compile_fullgraph():
    model, x = small(depth=1), torch.randn(1, 3, 20, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


BAD = {
    "depth": ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
    "feature_blocks": ({"feature_blocks": (3,)}, ValueError, r"feature_blocks must lie in 0\.\.2, got 3"),
    "pool": ({"final_pool_type": "max"}, ValueError, "final_pool_type must be 'mean' or 'none', got 'max'"),
    "rope": ({"if_rope": True}, ValueError, "if_rope must be False, as in every released model, got True"),
    "layerwise": ({"if_bidirectional": True}, ValueError, "if_bidirectional must be False"),
    "typo": ({"if_devide_out": True}, TypeError, "Vim has no argument 'if_devide_out'"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_images():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(1, 4, 20, 20\)"):
        small()(torch.randn(1, 4, 20, 20))
    with pytest.raises(ValueError, match="an image must be at least one patch of 4 x 4, got 3 x 20"):
        small()(torch.randn(1, 3, 3, 20))
    assert small(if_rope=False, fused_add_norm=False)(torch.randn(0, 3, 20, 20)).shape == (0, 5)
