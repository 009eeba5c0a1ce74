"""ssmkit evaluate: returns of trained models at several targets."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssmkit.data import atomic_write_text, make_environment, normalised_score
from ssmkit.train.report import table
from ssmkit.train.rollout import Mode, ModelAgent, returns_at_targets

EPILOG = """\
examples:
  ssmkit evaluate runs/pendulum --targets -150 -400 -900
  ssmkit evaluate runs/seed0 runs/seed1 runs/seed2 --episodes 50 --rollout both
  ssmkit evaluate runs/hopper --env Hopper-v5 --json results.json

Without --targets, quantiles of the training data's returns are asked for. A score stands beside the return where the
environment has published references; one that was measured in another simulator is marked as not comparable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders (or checkpoint files)")
    parser.add_argument("--targets", nargs="+", type=float, metavar="RETURN", help="returns to ask for")
    parser.add_argument("--episodes", type=int, default=20, help="episodes per target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the starts (default: %(default)s)")
    parser.add_argument("--env", help="environment, if not the one of the training data")
    parser.add_argument(
        "--rollout",
        choices=["streaming", "windowed", "both"],
        help="carry the model's state, or encode the last steps afresh (default: streaming where the model can)",
    )
    parser.add_argument(
        "--faithful-padding", action="store_true", help="windowed: pad short windows as the published code does"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here as well")


def run(arguments: argparse.Namespace) -> int:
    """Roll out, print a table, keep the numbers."""
    if arguments.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {arguments.episodes}")
    results = [result for path in arguments.runs for result in evaluate_run(Path(path), arguments)]
    header = ("run", "roll-out", "target", "return", "std", "score")
    print(table(header, [tuple(result[name] for name in header) for result in results]))
    if arguments.json:
        atomic_write_text(arguments.json, json.dumps(results, indent=2) + "\n")
        print(f"written to {arguments.json}")
    return 0


def evaluate_run(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per target and way of rolling out."""
    from ssmkit.train.trajectory import load_model

    model, scaling, description = load_model(path)
    data = description["data"]
    name = arguments.env or data["env"]
    env = make_environment(name, **({} if arguments.env else data["env_options"]))
    space = env.action_space
    sizes = (env.observation_dim, space.dim, space.discrete)
    if sizes != (model.config.state_dim, model.config.action_dim, model.config.discrete_actions):
        raise ValueError(f"{path} was trained on {data['env']}, whose observations or actions are not those of {name}")
    targets = arguments.targets or data["return_quantiles"]
    modes: list[Mode | None] = [arguments.rollout]
    if arguments.rollout == "both":
        modes = ["streaming", "windowed"] if model.streams else ["windowed"]
    rows = []
    for mode in modes:
        agent = ModelAgent(model.to(arguments.device), scaling, mode=mode, faithful_padding=arguments.faithful_padding)
        returns = returns_at_targets(agent, env, targets, episodes=arguments.episodes, seed=arguments.seed)
        for target, values in zip(targets, returns, strict=True):
            score = normalised_score(name, float(values.mean()))
            rows.append(
                {
                    "run": str(path),
                    "roll-out": agent.mode,
                    "target": float(target),
                    "return": float(values.mean()),
                    "std": float(np.std(values)),
                    "score": "" if score is None else str(score),
                    "returns": values.tolist(),
                }
            )
    return rows
