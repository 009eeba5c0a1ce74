"""What all backbones share: names, feature maps, heads, official weights; on a small backbone of its own."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from ssmkit.models import create_model, list_models, register_model
from ssmkit.models.vision.backbone import FeatureList, VisionBackbone
from ssmkit.models.vision.common import drop_path_rates, resample_pos_embed


class Two(VisionBackbone):
    """Two strided convolutions and a head."""

    def __init__(self, num_classes=3, in_chans=3, widths=(4, 6)):
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[1]
        self.first = nn.Conv2d(in_chans, widths[0], 2, 2)
        self.second = nn.Conv2d(widths[0], widths[1], 2, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.scale._no_weight_decay = True
        self.head = nn.Linear(widths[1], num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": widths[0], "reduction": 2, "module": "first"},
            {"num_chs": widths[1], "reduction": 4, "module": "second"},
        ]

    no_weight_decay_names = ("first.bias",)

    def forward_features(self, x, collect=None):
        for layer in (self.first, self.second):
            x = layer(x) * self.scale
            if collect is not None:
                collect.append(x)
        return x

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def translate(self, tensors):
        return {name.replace("one.", "first."): tensor for name, tensor in tensors.items()}


register_model("test_two", Two)
register_model("test_two_wide", Two, widths=(8, 8))


def test_models_are_made_by_name():
    assert list_models("test_*") == ["test_two", "test_two_wide"]
    assert create_model("test_two_wide", num_classes=5)(torch.randn(2, 3, 9, 8)).shape == (2, 5)


def test_a_taken_or_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'test_two' is already registered"):
        register_model("test_two", Two)
    with pytest.raises(ValueError, match="unknown model 'test_three', known: test_two, test_two_wide"):
        create_model("test_three")


def test_features_come_alone_or_beside_the_output():
    x = torch.randn(2, 3, 8, 12)
    model = create_model("test_two")
    last, maps = model.forward_intermediates(x, (-1, 0))
    assert [m.shape for m in maps] == [(2, 6, 2, 3), (2, 4, 4, 6)]
    assert torch.equal(maps[0], last)
    assert torch.equal(model.forward_head(last), model(x))
    only = create_model("test_two", features_only=True, out_indices=(-1,))
    assert isinstance(only, FeatureList)
    assert [m.shape for m in only(x)] == [(2, 6, 2, 3)]
    assert only.feature_info == [{"num_chs": 6, "reduction": 4, "module": "second"}]
    assert all(p.grad_fn is None and "head" not in name for name, p in only.named_parameters())


def test_levels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"indices must lie in -2\.\.1, got 2"):
        create_model("test_two").forward_intermediates(torch.randn(1, 3, 8, 8), (2,))
    with pytest.raises(ValueError, match="features_only=True"):
        create_model("test_two", out_indices=(0,))


def test_the_head_can_be_replaced_or_left_out():
    model = create_model("test_two").double()
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 4, 4, dtype=torch.float64)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 4, 4, dtype=torch.float64)).shape == (1, 6)
    with pytest.raises(ValueError, match="num_classes must be at least 0"):
        model.reset_classifier(-1)


def test_weight_decay_spares_flagged_and_named_parameters():
    assert create_model("test_two").no_weight_decay() == {"scale", "first.bias"}


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_official_weights_load_from_a_file(tmp_path, wrapper, prefix):
    source = create_model("test_two")
    state = {prefix + name.replace("first.", "one."): tensor for name, tensor in source.state_dict().items()}
    file = tmp_path / "weights.pth"
    torch.save(state if wrapper is None else {wrapper: state, "args": Namespace(lr=1.0), "epoch": 3}, file)
    model = create_model("test_two", checkpoint_path=file)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert model.scale._no_weight_decay


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    model = create_model("test_two")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"missing first.bias; unknown odd"):
        model.load_official({name: t for name, t in state.items() if name != "first.bias"} | {"odd": torch.ones(1)})
    with pytest.raises(ValueError, match=r"head.bias must have shape \(3,\), got \(4,\)"):
        model.load_official(dict(state) | {"head.bias": torch.ones(4)})
    with pytest.raises(ValueError, match="'epoch' is a int, not a tensor"):
        model.load_official({"epoch": 3})
    with pytest.raises(ValueError, match=r"two tensors are first\.bias"):
        model.load_official({"first.bias": torch.ones(4), "module.first.bias": torch.ones(4)})
    with pytest.raises(FileNotFoundError, match="no weights at"):
        model.load_official("nowhere.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_on_the_meta_device_is_filled_on_the_cpu():
    with torch.device("meta"):
        model = create_model("test_two")
    model.load_official(create_model("test_two").state_dict())
    assert model(torch.randn(1, 3, 4, 4)).shape == (1, 3)


def test_drop_path_rates_grow_linearly():
    assert drop_path_rates(0.3, (1, 3)) == [[0.0], pytest.approx([0.1, 0.2, 0.3])]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


def test_position_embeddings_are_resampled_but_for_prefix_tokens():
    pos = torch.randn(1, 1 + 12, 5)
    assert resample_pos_embed(pos, (3, 4), (3, 4), 1) is pos
    other = resample_pos_embed(pos, (3, 4), (6, 2), 1)
    assert other.shape == (1, 13, 5)
    assert torch.equal(other[:, 0], pos[:, 0])
    flat = resample_pos_embed(torch.ones(1, 12, 5), (3, 4), (5, 7))
    assert torch.allclose(flat, torch.ones(1, 35, 5))
    with pytest.raises(ValueError, match="pos must have 13 tokens"):
        resample_pos_embed(pos[:, 1:], (3, 4), (2, 2), 1)
