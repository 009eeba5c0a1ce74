"""Training a language model: resuming gives the numbers of an uninterrupted run; what is reported is what was reached."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback

from ssmkit.data.text import Text, bits_per_byte, gzip_bits_per_byte, scored_windows, split_text
from ssmkit.models.language import language_model
from ssmkit.train.checkpoint import LAST, RunError, load_checkpoint
from ssmkit.train.language import LanguageTask, fit, load_model
from ssmkit.train.options import Hardware, LanguageOptions
from ssmkit.train.report import learning_curve

CPU = Hardware(accelerator="cpu", devices=1)
OPTIONS = LanguageOptions(
    steps=8,
    batch_size=2,
    context=24,
    warmup=2,
    checkpoint_every=3,
    valid_every=4,
    valid_bytes=200,
    sample_bytes=8,
    seed=3,
)
MAMBA1 = {"variant": "byte-small", "d_model": 16, "n_layer": 2}
HYBRID = {"variant": "byte-hybrid", "d_model": 32, "n_layer": 3, "attn_layer_idx": (1,), "d_state": 16, "num_heads": 2}


@pytest.fixture
def texts(tmp_path):
    """Sentences in which what follows is told by what went before."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "größer"]
    files = []
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(" ".join(words[i] for i in rng.integers(4, size=150)))
        files.append(tmp_path / f"{index}.txt")
    return split_text(files, 0.3)


def make(variant, **settings):
    torch.manual_seed(OPTIONS.seed)
    return language_model(variant, **settings)


def train(model, texts, run, options=OPTIONS, **rest):
    return fit(model, *texts, run, options, hardware=CPU, progress=False, **rest)


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


CASES = {
    "mamba": (MAMBA1, {}),
    "hybrid": (HYBRID, {}),
    "carried state": (MAMBA1, {"carry_state": True}),
}


@pytest.mark.parametrize(("model", "options"), CASES.values(), ids=CASES)
def test_a_resumed_run_reaches_the_same_numbers(tmp_path, texts, model, options):
    """Weights, optimiser, schedule, batches and carried states all go on where they stood."""
    options = dataclasses.replace(OPTIONS, **options)
    whole, cut, resumed = make(**model), make(**model), make(**model)
    expected = train(whole, texts, tmp_path / "whole", options)
    with pytest.raises(RuntimeError, match="stopped"):
        train(cut, texts, tmp_path / "cut", options, callbacks=[StopAfter(5)])
    assert load_checkpoint(tmp_path / "cut" / LAST)["global_step"] == 3
    assert train(resumed, texts, tmp_path / "cut", options, resume=True) == expected
    assert same_weights(resumed, whole)
    states = [load_checkpoint(tmp_path / run / LAST)["optimizer_states"][0]["state"] for run in ("cut", "whole")]
    for index, state in states[1].items():
        assert all(torch.equal(state[key], states[0][index][key]) for key in ("exp_avg", "exp_avg_sq"))
    other = make(**model)
    train(other, texts, tmp_path / "other", dataclasses.replace(options, seed=4))
    assert not same_weights(other, whole)
    loaded, description = load_model(tmp_path / "cut")
    assert same_weights(loaded, whole)
    assert not loaded.training
    assert description["data"]["held_out_files"] == len(texts[1].pieces)


def test_results_are_those_of_the_model(tmp_path, texts):
    """Computed anew from the formula; a finished run is not trained again, and tells the same."""
    said = []
    model = make(**HYBRID)
    results = train(model, texts, tmp_path, say=said.append)
    windows = scored_windows(texts[1], OPTIONS.context)
    assert results.held_out == pytest.approx(bits_per_byte(model, texts[1], windows), rel=1e-5)
    assert (results.gzip_each, results.gzip_together) == gzip_bits_per_byte(texts[1])
    assert (results.held_out_bytes, results.held_out_files) == (texts[1].nbytes, len(texts[1].pieces))
    assert json.loads((tmp_path / "results.json").read_text()) == dataclasses.asdict(results)
    assert said[0].startswith("step 4: ")
    assert len(said) == 3, "a look, its sample, and the sample at the end"
    assert all(line.startswith("  | ") for line in said[1].splitlines())
    (tmp_path / "results.json").unlink()
    again = make(**HYBRID)
    assert train(again, texts, tmp_path, resume=True).held_out == pytest.approx(results.held_out, rel=1e-6)
    assert same_weights(again, model)


def test_the_held_out_text_has_its_curve(tmp_path, texts):
    train(make(**MAMBA1), texts, tmp_path, dataclasses.replace(OPTIONS, steps=12, valid_every=5))
    assert learning_curve(tmp_path, "held_out_bits_per_byte")[0] == [4, 9]
    steps, values = learning_curve(tmp_path, "bits_per_byte")
    assert steps == [9]
    assert 2 < values[0] < 9


def test_training_learns_the_words(tmp_path, texts):
    """A uniform choice of four words costs 2 bits a word of 5.25 bytes; an untrained model starts near 8 bits a byte."""
    options = dataclasses.replace(OPTIONS, steps=60, batch_size=8, context=32, lr=1e-2, warmup=5, sample_bytes=0)
    results = train(make(**HYBRID), texts, tmp_path, options)
    assert 2 / 6 < results.held_out < 2.5
    assert results.training < 2.5


def test_a_carried_state_is_that_of_the_windows_before(tmp_path, texts):
    """The loss of a later window is that of the whole text up to it, read at once."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append((batch, float(task.nats[-1])))

    options = dataclasses.replace(OPTIONS, carry_state=True, lr=0.0, warmup=0, steps=3)
    model = make(**MAMBA1)
    train(model, texts, tmp_path, options, callbacks=[Watch()])
    row = torch.cat([batch[:, :-1] for batch, _ in seen] + [seen[-1][0][:, -1:]], dim=1)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(row[:, :-1]).transpose(1, 2), row[:, 1:], reduction="none")
    expected = nats.unflatten(1, (3, OPTIONS.context)).mean(dim=(0, 2))
    assert [loss for _, loss in seen] == pytest.approx(expected.tolist(), rel=1e-5)


def test_bf16_trains(tmp_path, texts):
    hardware = dataclasses.replace(CPU, precision="bf16-mixed")
    model = make(**HYBRID)
    results = fit(model, *texts, tmp_path, OPTIONS, hardware=hardware, progress=False)
    assert math.isfinite(results.held_out)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


def test_no_decay_on_what_layers_exempt(tmp_path, texts):
    """Decay rates, skips, step sizes' biases, norms and embeddings."""
    watched = {}

    class Watch(Callback):
        def on_train_start(self, trainer, task):
            names = {id(p): name for name, p in task.model.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                watched.update({names[id(p)]: group["weight_decay"] for p in group["params"]})

    train(make(**HYBRID), texts, tmp_path, dataclasses.replace(OPTIONS, steps=1), callbacks=[Watch()])
    assert watched.keys() == dict(make(**HYBRID).named_parameters()).keys()
    assert set(watched.values()) == {0.0, OPTIONS.weight_decay}
    for name, decay in watched.items():
        exempt = name.endswith(("A_log", ".D", "dt_bias", ".bias")) or "norm" in name or "embedding" in name
        assert decay == (0.0 if exempt else OPTIONS.weight_decay), name


def test_a_run_folder_is_not_trained_over_by_accident(tmp_path, texts):
    short = dataclasses.replace(OPTIONS, steps=1)
    train(make(**MAMBA1), texts, tmp_path / "run", short)
    with pytest.raises(RunError, match="already holds a run; pass --resume"):
        train(make(**MAMBA1), texts, tmp_path / "run", short)
    with pytest.raises(RunError, match=r"another options \(lr: 0.003 then, 0.5 now\)"):
        train(make(**MAMBA1), texts, tmp_path / "run", dataclasses.replace(short, lr=0.5), resume=True)
    with pytest.raises(RunError, match="another data"):
        train(make(**MAMBA1), (texts[0], Text(texts[1].pieces * 2)), tmp_path / "run", short, resume=True)
    with pytest.raises(RunError, match="another model"):
        train(make(**{**MAMBA1, "n_layer": 1}), texts, tmp_path / "run", short, resume=True)
    before = (tmp_path / "run" / "results.json").read_text()
    train(make(**HYBRID), texts, tmp_path / "run", short, overwrite=True)
    assert (tmp_path / "run" / "results.json").read_text() != before


BAD_OPTIONS = {
    "a window of one byte": ({"context": 1}, "context must be at least 2, got 1"),
    "no look": ({"valid_every": 0}, "valid_every must be at least 1, got 0"),
    "less than nothing written": ({"sample_bytes": -1}, "sample_bytes must be at least 0, got -1"),
    "no step": ({"steps": 0}, "steps must be at least 1, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageOptions(**options)


def test_what_does_not_go_together_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="a model of bytes has vocab_size 256, got 512"):
        train(make(**{**MAMBA1, "vocab_size": 512}), texts, tmp_path)
    carry = dataclasses.replace(OPTIONS, carry_state=True)
    with pytest.raises(ValueError, match=r"carry_state needs a model without attention, .* attn_layer_idx \(1,\)"):
        train(make(**HYBRID), texts, tmp_path, carry)
    assert list(tmp_path.glob("config.json")) == []


def test_a_state_is_carried_in_one_process_only(monkeypatch, texts):
    task = LanguageTask(make(**MAMBA1), None, dataclasses.replace(OPTIONS, carry_state=True), {}, CPU)
    monkeypatch.setattr(LanguageTask, "trainer", SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match="carry_state keeps its states in one process, got 2; take one"):
        task.training_step(torch.zeros(1, 5, dtype=torch.int64), 0)


def test_other_checkpoints_are_refused(tmp_path, texts):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(RunError, match="not the checkpoint of a language model"):
        load_model(tmp_path / "other.ckpt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"kind": "trajectory"}))
    with pytest.raises(RunError, match="holds a run of a trajectory model, not of a language model"):
        train(make(**MAMBA1), texts, tmp_path / "run", resume=True)
