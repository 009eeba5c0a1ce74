"""Training: resuming gives the numbers of an uninterrupted run, also after a kill; bad requests are refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from data.factories import episode_set

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback

from ssmkit.data import PendulumEnvironment, record_episodes, record_pendulum
from ssmkit.data.pendulum import expert_torque
from ssmkit.models.trajectory import trajectory_model
from ssmkit.train.checkpoint import LAST, RunError, load_checkpoint
from ssmkit.train.report import learning_curve
from ssmkit.train.trajectory import Hardware, TrainOptions, fit, load_model

CPU = Hardware(accelerator="cpu", devices=1)
OPTIONS = TrainOptions(steps=12, batch_size=4, warmup=3, stages=4, checkpoint_every=5, seed=3)


def make(data, name="decision-mamba", **options):
    torch.manual_seed(OPTIONS.seed)
    sizes = {"state_dim": data.observation_dim, "action_dim": data.metadata.action_space.dim}
    return trajectory_model(name, None, **sizes, **{"dim": 16, "depth": 1, "context": 5, **options})


def train(model, data, run, options=OPTIONS, **rest):
    return fit(model, data, run, options, hardware=CPU, progress=False, **rest)


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    ("name", "options"),
    [("decision-mamba", {}), ("decision-transformer", {"dropout": 0.2}), ("ota-decision-mamba", {"dropout": 0.2})],
)
def test_a_resumed_run_reaches_the_same_numbers(tmp_path, name, options):
    """Weights, optimiser, schedule, past policy, batches and dropout all go on where they stood."""
    data = episode_set((20, 30))
    whole = train(make(data, name, **options), data, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        train(make(data, name, **options), data, tmp_path / "cut", callbacks=[StopAfter(8)])
    assert load_checkpoint(tmp_path / "cut" / LAST)["global_step"] == 5
    resumed = train(make(data, name, **options), data, tmp_path / "cut", resume=True)
    assert same_weights(resumed, whole)
    states = [load_checkpoint(tmp_path / run / LAST)["optimizer_states"][0]["state"] for run in ("cut", "whole")]
    for index, state in states[1].items():
        assert all(torch.equal(state[key], states[0][index][key]) for key in ("exp_avg", "exp_avg_sq"))
    other_start = train(make(data, name, **options), data, tmp_path / "other", dataclasses.replace(OPTIONS, seed=4))
    assert not same_weights(other_start, whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    data = episode_set((20, 30))
    whole = train(make(data), data, tmp_path / "run")
    again = train(make(data, dim=16), data, tmp_path / "run", resume=True)
    assert same_weights(again, whole)
    model, scaling, description = load_model(tmp_path / "run")
    assert same_weights(model, whole)
    assert not model.training
    assert description["data"]["episodes"] == 2
    assert len(scaling.state_mean) == 3


TRAINING = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads({threads})
    from train.test_training import CPU, TrainOptions, make
    from ssmkit.data import record_pendulum
    from ssmkit.train.trajectory import fit
    data = record_pendulum(episodes=4)
    options = TrainOptions(steps={steps}, batch_size=4, checkpoint_every=3, seed=3)
    fit(make(data, max_timestep=200), data, {run!r}, options, hardware=CPU, progress=False)
    """
)


def test_a_killed_training_leaves_a_whole_checkpoint_and_resumes_to_the_same_numbers(tmp_path):
    """SIGKILL at any moment: the newest checkpoint is readable, and going on from it changes nothing."""
    run, steps = tmp_path / "killed", 100_000
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = TRAINING.format(tests=tests, threads=torch.get_num_threads(), run=str(run), steps=steps)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (run / LAST).is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    output = child.communicate()[0].decode()
    assert (run / LAST).is_file(), output
    checkpoint = load_checkpoint(run / LAST)
    reached = checkpoint["global_step"]
    assert reached > 0
    assert reached % 3 == 0
    # Go on from the kill, and compare with a training that was never interrupted, over the steps that follow.
    data = record_pendulum(episodes=4)
    options = TrainOptions(steps=steps, batch_size=4, checkpoint_every=3, seed=3)
    stop = reached + 4
    models = []
    for folder, resume in ((run, True), (tmp_path / "whole", False)):
        model = make(data, max_timestep=200)
        with pytest.raises(RuntimeError, match="stopped"):
            train(model, data, folder, options, resume=resume, callbacks=[StopAfter(stop)])
        models.append(model)
    assert same_weights(*models)


def test_the_learning_curve_of_a_resumed_run_is_whole(tmp_path):
    data = episode_set((20, 30))
    options = dataclasses.replace(OPTIONS, steps=60, checkpoint_every=20)
    with pytest.raises(RuntimeError, match="stopped"):
        train(make(data), data, tmp_path, options, callbacks=[StopAfter(45)])
    train(make(data), data, tmp_path, options, resume=True)
    steps, losses = learning_curve(tmp_path)
    assert steps == [9, 19, 29, 39, 49, 59]
    assert np.isfinite(losses).all()


def test_training_lowers_the_loss(tmp_path):
    """On a controller without noise, whose rule the observations tell."""
    env = PendulumEnvironment()
    data = record_episodes(env, lambda o, rng: expert_torque(env.theta, env.velocity)[:, None], range(20))
    options = TrainOptions(steps=80, batch_size=16, lr=3e-3, warmup=5, refine_limit=0.0, checkpoint_every=100)
    train(make(data, dim=32, max_timestep=200, embedding="linear"), data, tmp_path, options)
    _, losses = learning_curve(tmp_path, "action_loss")
    assert np.mean(losses[-2:]) < 0.5 * losses[0]


def test_labels_are_refined_by_the_stage_before(tmp_path):
    """beta grows by stage up to its limit, and the past policy is the model at the start of the stage."""
    assert [OPTIONS.beta(step) for step in (0, 2, 3, 6, 9)] == pytest.approx([0, 0, 0.2125, 0.425, 0.5])
    data = episode_set((20, 30))
    snapshots = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            if trainer.global_step in (3, 9):
                snapshots[trainer.global_step] = {k: v.clone() for k, v in task.model.state_dict().items()}

        def on_train_batch_end(self, trainer, task, *rest):
            stage_start = (trainer.global_step - 1) // 3 * 3
            if stage_start in snapshots:
                past = task.past.state_dict()
                assert all(torch.equal(past[k], v) for k, v in snapshots[stage_start].items())

    refined = train(make(data), data, tmp_path / "on", callbacks=[Watch()])
    assert set(snapshots) == {3, 9}
    plain = train(make(data), data, tmp_path / "off", dataclasses.replace(OPTIONS, refine_limit=0.0))
    assert not same_weights(refined, plain)


@pytest.mark.parametrize("faithful", [False, True], ids=["masked", "as published"])
def test_left_padding_trains(tmp_path, faithful):
    data = episode_set((4, 3, 30))
    options = dataclasses.replace(OPTIONS, padding="left", faithful_padding=faithful)
    model = train(make(data), data, tmp_path, options)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_discrete_actions_train(tmp_path):
    data = episode_set((20, 30), count=3)
    model = train(make(data, discrete_actions=True), data, tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bf16_trains(tmp_path):
    data = episode_set((20, 30))
    hardware = dataclasses.replace(CPU, precision="bf16-mixed")
    model = fit(make(data), data, tmp_path, OPTIONS, hardware=hardware, progress=False)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


def test_a_run_folder_is_not_trained_over_by_accident(tmp_path):
    data = episode_set((20, 30))
    short = dataclasses.replace(OPTIONS, steps=2)
    train(make(data), data, tmp_path, short)
    with pytest.raises(RunError, match="already holds a run; pass --resume"):
        train(make(data), data, tmp_path, short)
    with pytest.raises(RunError, match=r"another options \(lr: 0.001 then, 0.5 now\)"):
        train(make(data), data, tmp_path, dataclasses.replace(short, lr=0.5), resume=True)
    with pytest.raises(RunError, match="another model"):
        train(make(data, dim=32), data, tmp_path, short, resume=True)
    other = episode_set((20, 31))
    with pytest.raises(RunError, match="another data"):
        train(make(other), other, tmp_path, short, resume=True)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-200])
    with pytest.raises(RunError, match="truncated or corrupt"):
        train(make(data), data, tmp_path, short, resume=True)
    train(make(data), data, tmp_path, short, overwrite=True)
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 2


BAD_OPTIONS = {
    "no step": ({"steps": 0}, "steps must be at least 1, got 0"),
    "an unknown schedule": ({"schedule": "linear"}, "schedule must be 'cosine' or 'constant', got 'linear'"),
    "labels that are all opinion": ({"refine_limit": 1.0}, r"refine_limit must lie in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


def test_a_model_of_other_sizes_is_refused(tmp_path):
    data = episode_set((20, 30))
    with pytest.raises(ValueError, match=r"the data has .* \(3, 2, False\), the model was made for \(4, 2, False\)"):
        train(trajectory_model("decision-mamba", None, state_dim=4, action_dim=2, dim=16, depth=1), data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(RunError, match="not the checkpoint of a trajectory model"):
        load_model(tmp_path / "other.ckpt")
    data = episode_set((20, 30))
    train(make(data), data, tmp_path / "run", dataclasses.replace(OPTIONS, steps=1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["name"] == "decision-mamba"
    (tmp_path / "run" / LAST).unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(tmp_path / "run")
