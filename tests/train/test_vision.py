"""Training a classifier of images or clips: resuming gives the numbers of an uninterrupted run; what is told is true."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from lightning.pytorch.callbacks import Callback

from ssmkit.data.clips import ClipData
from ssmkit.data.images import ImageData
from ssmkit.models.vision import VisionBackbone
from ssmkit.train.augment import Augment, mix
from ssmkit.train.checkpoint import LAST, load_checkpoint
from ssmkit.train.options import Hardware, VisionOptions
from ssmkit.train.vision import Normalise, SampleBatches, classifier, fit, load_trained, measure, receptive_fields

CPU = Hardware(accelerator="cpu", devices=1)
OPTIONS = VisionOptions(
    steps=6,
    batch_size=8,
    size=8,
    frames=2,
    warmup=2,
    checkpoint_every=2,
    valid_every=3,
    valid_samples=6,
    mixup=0.2,
    cutmix=1.0,
)
TINY = {"depth": 2, "embed_dim": 16, "patch_size": 4}


class Bars(Dataset):
    """Bright rows (class 0) or columns (class 1) on noise; as clips, the same in every frame."""

    def __init__(self, count, clip):
        self.count, self.clip = count, clip

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(3, 8, 8, generator=generator) * 0.3
        x[:, 2:4] += 0.6
        x = x if index % 2 == 0 else x.mT.contiguous()
        return (x.unsqueeze(1).repeat(1, 2, 1, 1) if self.clip else x), index % 2


def bars(kind):
    made, clip = (ClipData, True) if kind == "video" else (ImageData, False)
    half = (0.5, 0.5, 0.5)
    return made(
        train=Bars(40, clip), held_out=Bars(13, clip), classes=("rows", "columns"), mean=half, std=half, flip=True
    )


KINDS = {"vision": "vim_tiny", "video": "videomamba_tiny"}
kinds = pytest.mark.parametrize("kind", KINDS)


def train(kind, run, options=OPTIONS, **rest):
    return fit(kind, KINDS[kind], bars(kind), run, options, settings=TINY, hardware=CPU, progress=False, **rest)


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


@kinds
def test_a_resumed_run_reaches_the_same_numbers(tmp_path, kind):
    """Weights, optimiser, batches and augmentation go on where they stood; the run can be opened again."""
    said = []
    whole, expected = train(kind, tmp_path / "whole", say=said.append)
    assert said[0].startswith("step 3: held out: ")
    with pytest.raises(RuntimeError, match="stopped"):
        train(kind, tmp_path / "cut", callbacks=[StopAfter(5)])
    assert load_checkpoint(tmp_path / "cut" / LAST)["global_step"] == 4
    resumed, results = train(kind, tmp_path / "cut", resume=True)
    assert results == expected
    assert same_weights(resumed, whole)
    other, _ = train(kind, tmp_path / "other", dataclasses.replace(OPTIONS, seed=1))
    assert not same_weights(other, whole)

    assert json.loads((tmp_path / "cut" / "results.json").read_text()) == dataclasses.asdict(expected)
    for name in ("confusion.png", "receptive_fields.png"):
        assert (tmp_path / "cut" / name).read_bytes().startswith(b"\x89PNG")
    loaded, normalise, description = load_trained(tmp_path / "cut")
    assert same_weights(loaded, whole)
    assert description["data"]["classes"] == ["rows", "columns"]
    assert torch.equal(normalise.mean, torch.tensor([0.5, 0.5, 0.5]))
    again, told = train(kind, tmp_path / "cut", resume=True)
    assert told == expected
    assert same_weights(again, whole)


def test_what_is_measured_is_what_the_model_says():
    data, model = bars("vision"), classifier("vim_tiny", 2, 8, TINY)
    found = measure(model, data, batch_size=4)
    x, labels = (
        torch.stack(t) if t[0] is not None and torch.is_tensor(t[0]) else torch.tensor(t)
        for t in zip(*(data.held_out[i] for i in range(13)), strict=True)
    )
    with torch.no_grad():
        logits = model.eval()(Normalise(data.mean, data.std)(x))
    right = logits.argmax(1) == labels
    assert found.samples == 13
    assert found.accuracy == pytest.approx(float(right.float().mean()))
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert np.trace(found.confusion) == right.sum()
    assert np.sum(found.confusion, 1).tolist() == [7, 6]
    assert measure(model, data, batch_size=4, at_most=5).samples == 5


def test_every_sample_comes_once_per_epoch():
    batches = SampleBatches([(torch.tensor(float(i)), i) for i in range(10)])
    seen = torch.cat([batches.batch(4, seed=0, step=step)[1] for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batches.batch(4, seed=0, step=3)[1], seen[12:16])
    assert not torch.equal(batches.batch(10, seed=1, step=0)[1], seen[:10])


@pytest.mark.parametrize("strength", ["none", "light", "full"])
@pytest.mark.parametrize("clip", [False, True], ids=["image", "clip"])
def test_views_stay_in_range_and_follow_the_seed(strength, clip):
    x = torch.rand(3, 3, *([4] if clip else []), 20, 18)
    augment = Augment(16, strength, flip=True, clip=clip)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(augment(x))
    assert views[0].shape == (*x.shape[:-2], 16, 16)
    assert views[0].min() >= 0
    assert views[0].max() <= 1
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) == (strength == "none")


def test_frames_of_a_clip_get_the_same_view():
    x = torch.rand(2, 3, 1, 16, 16).repeat(1, 1, 4, 1, 1)
    torch.manual_seed(0)
    views = Augment(16, "light", flip=True, clip=True)(x)
    torch.testing.assert_close(views, views[:, :, :1].expand_as(views))
    assert not torch.equal(views[:, :, 0], x[:, :, 0])


def test_an_unknown_strength_is_refused():
    with pytest.raises(ValueError, match="augment must be one of none, light, full, got 'strong'"):
        Augment(8, "strong", flip=False, clip=False)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 0.5)], ids=["mixup", "cutmix"])
def test_mixed_samples_weigh_what_they_hold(mixup, cutmix):
    """Samples of one value each: the mean of a mixed one is the sum of both values by their weights."""
    torch.manual_seed(0)
    values = torch.arange(6.0)
    x = values.view(6, 1, 1, 1).expand(6, 2, 8, 8)
    for _ in range(5):
        mixed = mix(x, torch.arange(6), mixup, cutmix)
        assert torch.equal(mixed.first, torch.arange(6))
        means = mixed.weight * values[mixed.first] + (1 - mixed.weight) * values[mixed.second]
        torch.testing.assert_close(mixed.x.mean((1, 2, 3)), means)
    assert mix(x, torch.arange(6), 0.0, 0.0).x is x


class Patches(VisionBackbone):
    """One level of patches of 4 x 4, of which nothing else depends."""

    feature_info = [{"num_chs": 2, "reduction": 4, "module": "patches"}]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 2, 4, 4)

    def forward_features(self, x, collect=None):
        collect.append(self.patches(x))
        return collect[-1]


def test_receptive_fields_are_of_the_middle_cell():
    model = Patches()
    (field,) = receptive_fields(model, torch.randn(2, 3, 16, 20))
    assert field.shape == (16, 20)
    seen = model.patches.weight.detach().sum(0).abs().sum(0)
    torch.testing.assert_close(field[8:12, 8:12], seen / seen.max())
    assert field.count_nonzero() == seen.count_nonzero()


def test_exempt_parameters_are_not_decayed(tmp_path):
    model, _ = train("vision", tmp_path, dataclasses.replace(OPTIONS, steps=1))
    assert "pos_embed" in model.no_weight_decay()
    groups = load_checkpoint(tmp_path / LAST)["optimizer_states"][0]["param_groups"]
    names = [name for name, p in model.named_parameters() if p.ndim >= 2 and name not in model.no_weight_decay()]
    assert len(groups[0]["params"]) == len(names)
    assert groups[1]["weight_decay"] == 0
