"""VideoMamba: sizes, official weights, the equations of the stack, scan orders, inflation, other lengths, compilation."""

from copy import deepcopy

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.models import create_model, list_models
from ssmkit.models.video import SCAN_ORDERS, VideoMamba, VideoMambaImage

SIZES = {"tiny": (24, 192), "small": (24, 384), "middle": (32, 576), "base": (24, 768)}
MIXERS = {192: 281_856, 384: 1_042_944, 576: 2_283_264, 768: 4_002_816}
SMALL = {"img_size": 12, "patch_size": 4, "num_frames": 4, "depth": 4, "embed_dim": 8, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    model = VideoMamba(**(SMALL | options)).eval()
    torch.nn.init.normal_(model.cls_token)
    torch.nn.init.normal_(model.temporal_pos_embedding)
    return model


def image(**options):
    torch.manual_seed(1)
    return VideoMambaImage(
        **{k: v for k, v in SMALL.items() if k != "num_frames"} | {"num_classes": 7} | options
    ).eval()


def test_every_published_size_is_there():
    clips = {f"videomamba_{size}" for size in SIZES if size != "base"}
    assert set(list_models("videomamba_*")) == clips | {f"videomamba_{size}_image" for size in SIZES}


@pytest.mark.parametrize("name", list_models("videomamba_*"))
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    depth, width = SIZES[name.split("_")[1]]
    shared = depth * (MIXERS[width] + width) + width + (3 * 256 + 1) * width + 197 * width + width
    rest = 1000 * (width + 1) if name.endswith("image") else 8 * width + 400 * (width + 1)
    assert sum(p.numel() for p in model.parameters()) == shared + rest


def test_official_names():
    with torch.device("meta"):
        clips, pictures = (create_model(name).state_dict() for name in ("videomamba_middle", "videomamba_middle_image"))
    assert {
        "cls_token": (1, 1, 576),
        "pos_embed": (1, 197, 576),
        "temporal_pos_embedding": (1, 8, 576),
        "patch_embed.proj.weight": (576, 3, 1, 16, 16),
        "patch_embed.proj.bias": (576,),
        "layers.31.mixer.in_proj.weight": (2304, 576),
        "layers.0.mixer.x_proj_b.weight": (68, 1152),
        "layers.0.mixer.A_b_log": (1152, 16),
        "layers.0.norm.weight": (576,),
        "norm_f.weight": (576,),
        "head.weight": (400, 576),
    }.items() <= {name: tuple(tensor.shape) for name, tensor in clips.items()}.items()
    assert pictures.keys() == clips.keys() - {"temporal_pos_embedding"}
    assert pictures["patch_embed.proj.weight"].shape == (576, 3, 16, 16)


def test_official_weights_load_strictly(tmp_path):
    source, model, x = small(), VideoMamba(**SMALL).eval(), torch.randn(1, 3, 4, 12, 12)
    file = tmp_path / "videomamba_t16_k400_f8_res224.pth"
    torch.save({"model": {f"backbone.{n}": t for n, t in source.state_dict().items()}}, file)
    model.load_official(file)
    assert torch.equal(model(x), source(x))
    with pytest.raises(ValueError, match=r"missing cls_token"):
        model.load_official({n: t for n, t in source.state_dict().items() if n != "cls_token"})
    with pytest.raises(ValueError, match=r"temporal_pos_embedding is missing: .* load_pretrained"):
        model.load_official(image().state_dict())
    headless = small(num_classes=0)
    headless.load_official(source.state_dict())
    assert torch.equal(headless(x), source.forward_head(source.forward_features(x), pre_logits=True))


def tokens_of(model, x):
    """Patches frame by frame and row by row with both position embeddings, the class token in front."""
    batch, frames = x.shape[0], x.shape[2]
    weight, bias = model.patch_embed.proj.weight[:, :, 0], model.patch_embed.proj.bias
    clip = [F.conv2d(x[:, :, t], weight, bias, stride=4).flatten(2).mT for t in range(frames)]
    clip = [part + model.pos_embed[:, 1:] + model.temporal_pos_embedding[:, [t]] for t, part in enumerate(clip)]
    first = (model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1)
    return torch.cat([first, *clip], dim=1)


def run_blocks(model, stream, mix):
    """Plain residual blocks, block i calling mix(i, mixer, normalised tokens); outputs of the mixers, and of norm_f."""
    outputs = []
    for index, block in enumerate(model.layers):
        outputs.append(mix(index, block.mixer, F.rms_norm(stream, (8,), block.norm.weight, 1e-5)))
        stream = stream + outputs[-1]
    return outputs, F.rms_norm(stream, (8,), model.norm_f.weight, 1e-5)


def test_the_released_order_is_the_plain_mixer_over_the_tokens_as_they_lie():
    model, x = small().double(), torch.randn(2, 3, 4, 12, 12).double()
    outputs, expected = run_blocks(model, tokens_of(model, x), lambda index, mixer, u: mixer(u))
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(model(x), model.head(expected[:, 0]))
    for found, output in zip(maps, outputs, strict=True):
        torch.testing.assert_close(found, output[:, 1:].mT.unflatten(2, (4, 3, 3)))


# Of each layer of four: which order the forward and which the backward direction walks, s spatial, t temporal.
ORDERS = {
    "spatial": [("s", "s")] * 4,
    "temporal": [("t", "t")] * 4,
    "spatial forwards, temporal backwards": [("s", "t")] * 4,
    "spatial and temporal": [("st", "st")] * 4,
    "spatial, then temporal": [("s", "s")] * 2 + [("t", "t")] * 2,
    "temporal, then spatial": [("t", "t")] * 2 + [("s", "s")] * 2,
    "alternating": [("s", "s"), ("t", "t")] * 2,
}


@pytest.mark.parametrize("order", SCAN_ORDERS)
def test_scan_orders_are_gathers_before_and_scatters_after(order):
    model, x = small(scan_order=order).double(), torch.randn(2, 3, 4, 12, 12).double()
    place = torch.arange(1, 37).view(4, 9).mT.flatten()  # all frames of a place, then the next place
    there = {"s": torch.arange(37), "t": torch.cat((torch.zeros(1, dtype=torch.long), place))}

    def mix(index, mixer, u):
        y = 0
        for letters, other in zip(ORDERS[order][index], ("_b", ""), strict=True):
            for letter in letters:
                y = y + silenced(mixer, other)(u[:, there[letter]])[:, there[letter].argsort()]
        return y

    torch.testing.assert_close(model.forward_features(x), run_blocks(model, tokens_of(model, x), mix)[1])


@torch.no_grad()
def silenced(mixer, suffix):
    """The mixer without one of its directions."""
    mixer = deepcopy(mixer)
    getattr(mixer, f"D{suffix}").zero_()
    getattr(mixer, f"x_proj{suffix}").weight.zero_()
    return mixer


def test_the_orders_differ_and_a_single_frame_has_but_one():
    x = torch.randn(1, 3, 4, 12, 12)
    results = [images.perturbed(small(scan_order=order))(x) for order in SCAN_ORDERS]
    for index, result in enumerate(results):
        assert all(not torch.allclose(result, other) for other in results[:index])
    frame = x[:, :, :1]
    expected = small(num_frames=1)(frame)
    for order in SCAN_ORDERS:
        if order != "spatial and temporal":
            torch.testing.assert_close(small(num_frames=1, scan_order=order)(frame), expected)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("inflation", ["center", "mean"])
def test_image_weights_start_a_model_of_clips(inflation, frames):
    source, model = image(), small(kernel_size=frames, num_frames=4 * frames)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_pretrained(source.state_dict(), inflation=inflation)
    for name, tensor in model.state_dict().items():
        if name.startswith(("head.", "temporal_pos_embedding")):
            assert torch.equal(tensor, before[name])
        elif name != "patch_embed.proj.weight":
            assert torch.equal(tensor, source.state_dict()[name])
    still = torch.randn(1, 3, 1, 12, 12).expand(-1, -1, frames, -1, -1)
    tokens = source.patch_embed(still[:, :, 0])
    torch.testing.assert_close(model.patch_embed(still)[:, 0], tokens)
    moving = still.clone()
    moving[:, :, frames // 2] += 1
    assert not torch.allclose(model.patch_embed(moving)[:, 0], tokens)
    if frames == 3:
        moving = still.clone()
        moving[:, :, 0] += 1
        assert torch.allclose(model.patch_embed(moving)[:, 0], tokens, atol=1e-6) == (inflation == "center")


def test_masked_pretraining_starts_a_model_of_longer_clips():
    source, model = small(), small(num_frames=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {n: t for n, t in source.state_dict().items() if not n.startswith(("head.", "norm_f."))}
    state |= {"norm.weight": torch.randn(8), "clip_decoder.0.head.weight": torch.randn(4, 8)}
    model.load_pretrained({"model": state})
    assert torch.equal(model.layers[3].mixer.D_b, source.layers[3].mixer.D_b)
    temporal = F.interpolate(source.temporal_pos_embedding.mT, size=6, mode="linear").mT
    assert torch.equal(model.temporal_pos_embedding, temporal)
    assert torch.equal(model.norm_f.weight, before["norm_f.weight"])
    assert torch.equal(model.head.weight, before["head.weight"])
    with pytest.raises(ValueError, match=r"missing layers\.0\.norm\.weight"):
        model.load_pretrained({n: t for n, t in state.items() if n != "layers.0.norm.weight"})


def test_frames_are_told_apart_by_their_positions_where_nothing_is_scanned():
    class Mean(torch.nn.Module):
        def forward(self, u, **walk):
            return u.mean(1, keepdim=True).expand_as(u)

    model, x = small().double(), torch.randn(1, 3, 4, 12, 12).double()
    for block in model.layers:
        block.mixer = Mean()
    assert not torch.allclose(model(x), model(x[:, :, [2, 0, 3, 1]]))
    torch.nn.init.zeros_(model.temporal_pos_embedding)
    torch.testing.assert_close(model(x), model(x[:, :, [2, 0, 3, 1]]))


def test_a_clip_is_one_sequence():
    for grid, length in (((8, 14, 14), 1569), ((16, 14, 14), 3137), ((64, 24, 24), 36_865)):
        walks = small(depth=1).walks(grid)
        assert [len(path) for path in (*walks[0]["path"], *walks[0]["path_b"])] == [length, length]


def test_the_image_model_averages_nothing():
    model, x = image().double(), torch.randn(2, 3, 12, 12).double()
    tokens = model.patch_embed(x).flatten(1, 2)
    stream = torch.cat((model.cls_token.expand(2, -1, -1), tokens), dim=1) + model.pos_embed
    assert not any(block.mixer.if_divide_out for block in model.layers)
    expected = run_blocks(model, stream, lambda index, mixer, u: mixer(u))[1]
    torch.testing.assert_close(model(x), model.head(expected[:, 0]))


def test_weights_for_clips_of_another_size_and_length():
    source, model = small(), small(num_frames=10, img_size=20)
    model.load_official(source.state_dict())
    temporal = F.interpolate(source.temporal_pos_embedding.mT, size=10, mode="linear").mT
    assert torch.equal(model.temporal_pos_embedding, temporal)
    assert model.pos_embed.shape == (1, 26, 8)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    x = torch.randn(1, 3, 10, 20, 20)
    torch.testing.assert_close(model(x), source(x))
    with pytest.raises(ValueError, match="pos_embed has 9 tokens, not those of a square image"):
        model.load_official(source.state_dict() | {"pos_embed": source.pos_embed[:, 1:]})


@pytest.mark.parametrize("size", [(1, 4, 4), (5, 13, 22)], ids=str)
def test_clips_of_odd_sizes(size):
    model = small(scan_order="alternating")
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for info, found in zip(model.feature_info, maps, strict=True):
        assert found.shape == (1, info["num_chs"], size[0], size[1] // 4, size[2] // 4)
    assert small()(torch.randn(0, 3, 4, 12, 12)).shape == (0, 5)


def test_maps_alone_and_tubelets():
    only = create_model("videomamba_tiny", features_only=True, out_indices=(-1,), kernel_size=2, **SMALL)
    assert [m.shape for m in only(torch.randn(2, 3, 4, 12, 12))] == [(2, 8, 2, 3, 3)]
    assert small(kernel_size=2).temporal_pos_embedding.shape == (1, 2, 8)


def test_start_values_and_weight_decay():
    torch.manual_seed(0)
    model = VideoMamba(**SMALL)
    for block in model.layers:
        dt = F.softplus(block.mixer.dt_proj.bias)
        assert dt.min() >= 1e-4 and dt.max() <= 0.1 * (1 + 1e-5)
        assert not block.mixer.dt_proj_b.bias.any()
        assert block.mixer.in_proj.weight.abs().max() < 0.1
        assert 0.8 < block.mixer.out_proj.weight.abs().max() * (16 * 4) ** 0.5 <= 1
    assert not model.cls_token.any() and not model.temporal_pos_embedding.any()
    assert {"pos_embed", "cls_token", "temporal_pos_embedding", "layers.0.mixer.D_b"} <= model.no_weight_decay()


def test_backward_reaches_every_parameter():
    x, grads = torch.randn(2, 3, 4, 12, 12), []
    for count in (0, 2):
        model = small(checkpoint_num=count, drop_path_rate=0.0, scan_order="spatial and temporal").train()
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    # The class token begins the forward walks, so no decay reaches what the last block makes of it.
    idle = [name for (name, _), grad in zip(model.named_parameters(), grads[0], strict=True) if not grad.any()]
    assert idle == ["layers.3.mixer.A_log"]
    torch.testing.assert_close(grads[0], grads[1])


def test_compile_fullgraph():
    model, x = small(depth=1, scan_order="temporal"), torch.randn(1, 3, 4, 12, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


BAD = {
    "scan_order": ({"scan_order": "hwt"}, ValueError, "scan_order must be one of 'spatial', 'temporal', .*, got 'hwt'"),
    "clip": ({"num_frames": 1, "kernel_size": 2}, ValueError, "at least one tubelet of 2 x 4 x 4, got 1 x 12 x 12"),
    "typo": ({"bimamba_typ": "v2"}, TypeError, "VideoMamba has no argument 'bimamba_typ'"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_calls():
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, 3, frames, height, width\), got \(1, 3, 12, 12\)"
    ):
        small()(torch.randn(1, 3, 12, 12))
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.uint8"):
        small()(torch.zeros(1, 3, 4, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="inflation must be 'center' or 'mean', got 'centre'"):
        small().load_pretrained({}, inflation="centre")
