"""ssmkit train trajectory: a policy from recorded trajectories."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ssmkit.data import EpisodeSet, load_episodes, save_episodes
from ssmkit.models.trajectory import MODELS, TrajectoryModel, row_of, trajectory_model
from ssmkit.train.checkpoint import process_rank
from ssmkit.train.commands.arguments import (
    add_options,
    add_run_arguments,
    add_settings,
    hardware_from,
    logger_from,
    options_from,
    parse_settings,
)
from ssmkit.train.options import TrainOptions
from ssmkit.train.sources import SOURCES, open_source, summary

DESCRIPTION = "Train a trajectory model: given a return to reach, it acts."

EPILOG = """\
examples:
  ssmkit train trajectory --data pendulum-velocity-hidden --variant demo --steps 1000 --out runs/hidden
  ssmkit train trajectory --data data/hopper.npz --model decision-mamba --set dim=256 depth=4 --out runs/hopper
  ssmkit train trajectory --data minari:mujoco/hopper/expert-v0 --model decision-transformer --out runs/hopper-dt
  ssmkit train trajectory --data data/pendulum.npz --model behaviour-cloning --best 0.1 --out runs/top-tenth
  ssmkit train trajectory --data data/hopper.npz --out runs/hopper --precision bf16-mixed --devices 4

A training that was killed goes on, to the same numbers, with the same command and --resume."""

# Fields of TrainOptions that other trainings lack -> help text.
OPTION_HELP = {
    "padding": "side of the pads in short windows: right or left",
    "faithful_padding": "left pads as in the published code, to reproduce it",
    "state_weight": "share of predicting the next state in the loss, for models that do",
    "return_weight": "share of predicting the next return-to-go, likewise",
    "refine_limit": "largest weight of the past policy in the labels; 0 turns refinement off",
    "refine_growth": "how fast that weight grows over the stages",
    "stages": "how often the past policy is renewed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="SOURCE", help=SOURCES)
    data.add_argument("--env", help="environment to evaluate in, where the data does not name it (D4RL files)")
    data.add_argument("--episodes", type=int, default=400, help="how many to record from an environment (%(default)s)")
    data.add_argument("--best", type=float, default=1.0, metavar="FRACTION", help="keep this best part of the episodes")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="decision-mamba", choices=list(MODELS), help="(default: %(default)s)")
    variants = "; ".join(f"{name}: {', '.join(row.variants)}" for name, row in MODELS.items())
    model.add_argument("--variant", help=f"named sizes (default: the first). {variants}")
    add_settings(model, "dim=256 depth=4 context=30")
    add_run_arguments(parser)
    add_options(parser, TrainOptions, OPTION_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say how to evaluate."""
    import torch

    from ssmkit.train.trajectory import fit

    options = options_from(arguments, TrainOptions)
    run_folder = Path(arguments.out)
    data = training_data(arguments, run_folder)
    torch.manual_seed(options.seed)
    model = model_for(arguments.model, arguments.variant, data, parse_settings(arguments.set))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if process_rank() == 0:
        print(summary(data))
        print(f"{arguments.model}: {parameters:,} parameters, window of {model.config.context} steps")
    fit(
        model,
        data,
        run_folder,
        options,
        source=arguments.data,
        hardware=hardware_from(arguments),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        logger=logger_from(arguments),
    )
    if process_rank() == 0:
        print(f"trained; next: ssmkit evaluate {run_folder}")
    return 0


def training_data(arguments: argparse.Namespace, run_folder: Path) -> EpisodeSet:
    """The source's episodes. What is recorded is kept in the run folder, so that a resumed run reads the same."""
    kept = run_folder / "data.npz"
    if arguments.resume and kept.is_file():
        data = load_episodes(kept)
    else:
        data = open_source(arguments.data, episodes=arguments.episodes, seed=arguments.seed, env=arguments.env)
        recorded = process_rank() == 0 and not arguments.data.startswith("minari:") and not Path(arguments.data).suffix
        if recorded and (arguments.overwrite or not (run_folder / "config.json").exists()):
            save_episodes(data, kept)
    return data.best(arguments.best) if arguments.best != 1.0 else data


def model_for(name: str, variant: str | None, data: EpisodeSet, settings: dict[str, Any]) -> TrajectoryModel:
    """A fresh model with the sizes of the data."""
    space = data.metadata.action_space
    sizes = {
        "state_dim": data.observation_dim,
        "action_dim": space.dim,
        "discrete_actions": space.discrete,
        "max_timestep": data.metadata.max_episode_steps,
    }
    known = {entry.name for entry in fields(row_of(name).config)}
    return trajectory_model(name, variant, **{**{k: v for k, v in sizes.items() if k in known}, **settings})
