"""The command line: help that teaches, the whole job from recording to evaluation, mistakes without tracebacks."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("gymnasium")

from ssmkit.cli import COMMANDS, build_parser, main
from ssmkit.data import EpisodeSet, load_episodes
from ssmkit.train.commands.arguments import parse_settings
from ssmkit.train.demo import DemoOptions, run_demo

OURS = [name for name, command in COMMANDS.items() if not command.own_parser]
TINY = ["--set", "dim=16", "depth=1", "context=5", "--batch-size", "4", "--accelerator", "cpu", "--devices", "1"]


def run(capsys, *argv):
    status = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main([*argv, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    text = help_of(capsys)
    for name, command in COMMANDS.items():
        assert name in text
        assert command.summary in " ".join(text.split())
    assert "examples:" in text


@pytest.mark.parametrize(
    "argv",
    [*([name] for name in OURS if name != "train"), ["train", "trajectory"], ["train", "language"]],
    ids=" ".join,
)
def test_each_command_shows_examples_that_parse(argv, capsys):
    text = help_of(capsys, *argv)
    examples = [line.strip().split("   ")[0] for line in text.splitlines() if line.strip().startswith("ssmkit ")]
    assert examples
    for example in examples:
        build_parser(argv[0]).parse_args(shlex.split(example)[1:])


def test_the_job_from_recording_to_evaluation(tmp_path, capsys):
    data, folder, results = tmp_path / "data.npz", tmp_path / "run", tmp_path / "results.json"
    status, out, _ = run(capsys, "record", "pendulum-velocity-hidden", "--episodes", 6, "--out", data)
    assert status == 0
    assert "6 episodes, 1200 steps" in out
    assert isinstance(load_episodes(data), EpisodeSet)

    train = ["train", "trajectory", "--data", data, "--out", folder, "--steps", 3, *TINY]
    status, out, _ = run(capsys, *train)
    assert status == 0
    assert "window of 5 steps" in out
    status, out, err = run(capsys, *train)
    assert status == 2
    assert "already holds a run" in err
    assert run(capsys, *train, "--resume")[0] == 0

    evaluate = ["evaluate", folder, "--episodes", 2, "--rollout", "both", "--targets", -100, -900, "--json", results]
    status, out, _ = run(capsys, *evaluate)
    assert status == 0
    rows = json.loads(results.read_text())
    assert [(row["roll-out"], row["target"]) for row in rows] == [
        ("streaming", -100.0),
        ("streaming", -900.0),
        ("windowed", -100.0),
        ("windowed", -900.0),
    ]
    for row in rows:
        assert row["return"] == pytest.approx(np.mean(row["returns"]))
        assert f"{row['return']:.1f}" in out


def test_a_gymnasium_id_is_recorded_trained_on_and_evaluated(tmp_path, capsys):
    folder = tmp_path / "run"
    train = ["train", "trajectory", "--data", "CartPole-v1", "--episodes", 5, "--out", folder, "--steps", 2, *TINY]
    assert run(capsys, *train)[0] == 0
    recorded = load_episodes(folder / "data.npz")
    assert run(capsys, *train, "--resume")[0] == 0
    np.testing.assert_array_equal(load_episodes(folder / "data.npz").observations, recorded.observations)
    status, out, _ = run(capsys, "evaluate", folder, "--episodes", 2)
    assert status == 0
    assert out.count("streaming") == 4
    status, _, err = run(capsys, "evaluate", folder, "--env", "Pendulum-v1")
    assert status == 2
    assert "was trained on CartPole-v1" in err


def test_record_converts_to_and_from_minari(tmp_path, capsys, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    assert run(capsys, "record", "pendulum", "--episodes", 3, "--out", first)[0] == 0
    assert run(capsys, "record", first, "--out", "minari:pendulum/mixed-v0")[0] == 0
    assert run(capsys, "record", "minari:pendulum/mixed-v0", "--out", second)[0] == 0
    np.testing.assert_array_equal(load_episodes(second).observations, load_episodes(first).observations)


def test_a_policy_of_ones_own_records(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_policy.py").write_text(
        "import numpy as np\ndef make_policy(env):\n    return lambda o, rng: np.full((len(o), env.action_space.dim), 2.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "a.npz"
    argv = ["record", "Pendulum-v1", "--policy", "own_policy:make_policy", "--episodes", 2, "--out", out]
    assert run(capsys, *argv)[0] == 0
    assert (load_episodes(out).actions == 2).all()


MISTAKES = {
    "a missing file": (["train", "trajectory", "--data", "none.npz", "--out", "r"], "no episode file at none.npz"),
    "an unknown environment": (["record", "Nowhere-v0", "--out", "a.npz"], "cannot make 'Nowhere-v0'"),
    "an unknown kind of file": (["record", "a.pkl", "--out", "a.npz"], "not a known source of trajectories"),
    "a wrong suffix": (["record", "pendulum", "--episodes", "1", "--out", "a.dat"], "ends in .npz"),
    "no episodes": (["record", "pendulum", "--episodes", "0", "--out", "a.npz"], "at least 1, got 0"),
    "a policy without a function": (["record", "pendulum", "--policy", "os", "--out", "a.npz"], "'module:function'"),
    "a policy that is not there": (
        ["record", "pendulum", "--policy", "os:no", "--out", "a.npz"],
        "cannot load the policy",
    ),
    "no run": (["evaluate", "nothing"], "no checkpoint at nothing"),
    "a folder that is no run": (["evaluate", "."], "not a run folder"),
    "an unknown setting": (
        ["train", "trajectory", "--data", "pendulum", "--episodes", "1", "--out", "r", "--set", "size=3"],
        "decision-mamba has no option size; it has action_dim",
    ),
    "a setting without a value": (
        ["train", "trajectory", "--data", "pendulum", "--episodes", "1", "--out", "r", "--set", "dim"],
        "--set takes NAME=VALUE, got 'dim'",
    ),
    "an unknown variant": (
        ["train", "trajectory", "--data", "pendulum", "--episodes", "1", "--out", "r", "--variant", "huge"],
        "unknown variant 'huge'",
    ),
    "a D4RL file without a name": (["record", "hopper.hdf5", "--out", "a.npz"], "pass --env, e.g. hopper-medium-v2"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_a_message(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.startswith("ssmkit: error: ")
    assert message in err
    assert "Traceback" not in err


def test_settings_are_read_as_values():
    assert parse_settings(["dim=256", "embedding=linear", "released_tiling=true", "dropout=0.1"]) == {
        "dim": 256,
        "embedding": "linear",
        "released_tiling": True,
        "dropout": 0.1,
    }


def test_the_demo_leaves_its_table_and_pictures(tmp_path):
    """In miniature: that it runs; what it reaches is not to be expected of a handful of steps."""
    options = DemoOptions(seeds=2, steps=10, cloning_steps=2, episodes=10, evaluation_episodes=2)
    text = run_demo(tmp_path, options)
    for row in ("behaviour, mean", "90th percentile", "behaviour cloning", "top-10 % cloning"):
        assert row in text
    assert text.count("Decision Mamba") == 4
    for name in ("table.txt", "trajectories.npz", "learning_curve.png", "return_against_target.png", "rollout.gif"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_a_reader_that_has_enough_is_no_mistake():
    """`ssmkit record ... | head -1`, where the pipe is closed before anything is written."""
    module = "type('M', (), {'add_arguments': lambda parser: None, 'run': lambda arguments: print('text') or 0})"
    program = f"import sys, ssmkit.cli as c; c.import_command = lambda name: {module}; sys.exit(c.main(['record']))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-c", program], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
