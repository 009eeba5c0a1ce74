"""ssmkit train: one subcommand per family of models."""

import argparse
import ast
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ssmkit.data import EpisodeSet, load_episodes, save_episodes
from ssmkit.models.trajectory import MODELS, TrajectoryModel, row_of, trajectory_model
from ssmkit.train.checkpoint import process_rank
from ssmkit.train.sources import SOURCES, open_source, summary

EPILOG = """\
examples:
  ssmkit train trajectory --data pendulum-velocity-hidden --variant demo --steps 1000 --out runs/hidden
  ssmkit train trajectory --data data/hopper.npz --model decision-mamba --set dim=256 depth=4 --out runs/hopper
  ssmkit train trajectory --data minari:mujoco/hopper/expert-v0 --model decision-transformer --out runs/hopper-dt
  ssmkit train trajectory --data data/pendulum.npz --model behaviour-cloning --best 0.1 --out runs/top-tenth
  ssmkit train trajectory --data data/hopper.npz --out runs/hopper --precision bf16-mixed --devices 4

A training that was killed goes on, to the same numbers, with the same command and --resume."""

# TrainOptions field -> help text; the flag is the name with dashes.
OPTION_HELP = {
    "steps": "optimiser steps",
    "batch_size": "windows per step and device",
    "lr": "peak learning rate",
    "weight_decay": "AdamW's decay of matrices",
    "clip": "norm that gradients are clipped to",
    "warmup": "steps of linear warm-up",
    "schedule": "learning rate after warm-up: cosine (down to a tenth) or constant",
    "seed": "fixes weights, batches and dropout",
    "padding": "side of the pads in short windows: right or left",
    "state_weight": "share of predicting the next state in the loss, for models that do",
    "return_weight": "share of predicting the next return-to-go, likewise",
    "refine_limit": "largest weight of the past policy in the labels; 0 turns refinement off",
    "refine_growth": "how fast that weight grows over the stages",
    "stages": "how often the past policy is renewed",
    "checkpoint_every": "steps between checkpoints",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Families of models, each with its arguments."""
    families = parser.add_subparsers(dest="family", metavar="FAMILY", required=True)
    child = families.add_parser(
        "trajectory",
        help="a policy from recorded trajectories",
        description="Train a trajectory model: given a return to reach, it acts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_trajectory_arguments(child)


def add_trajectory_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ssmkit train trajectory`."""
    from ssmkit.train.trajectory import TrainOptions

    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="SOURCE", help=SOURCES)
    data.add_argument("--env", help="environment to evaluate in, where the data does not name it (D4RL files)")
    data.add_argument("--episodes", type=int, default=400, help="how many to record from an environment (%(default)s)")
    data.add_argument("--best", type=float, default=1.0, metavar="FRACTION", help="keep this best part of the episodes")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="decision-mamba", choices=list(MODELS), help="(default: %(default)s)")
    variants = "; ".join(f"{name}: {', '.join(row.variants)}" for name, row in MODELS.items())
    model.add_argument("--variant", help=f"named sizes (default: the first). {variants}")
    model.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the model's config, e.g. dim=256 depth=4 context=30 (an unknown name lists all)",
    )
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--out", required=True, metavar="RUN", help="run folder")
    run_group.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    run_group.add_argument("--overwrite", action="store_true", help="delete what the run folder holds and start anew")
    run_group.add_argument("--accelerator", default="auto", help="cpu, gpu, auto (%(default)s)")
    run_group.add_argument("--devices", default="auto", help="how many (%(default)s)")
    run_group.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, 16-mixed (%(default)s)")
    run_group.add_argument("--workers", type=int, default=0, help="processes that prepare batches (%(default)s)")
    run_group.add_argument("--logger", default="csv", choices=["csv", "tensorboard", "none"], help="(%(default)s)")
    options = parser.add_argument_group("training")
    for entry in fields(TrainOptions):
        flag = f"--{entry.name.replace('_', '-')}"
        if entry.name == "faithful_padding":
            options.add_argument(flag, action="store_true", help="left pads as in the published code, to reproduce it")
            continue
        assert entry.default is not MISSING
        options.add_argument(
            flag, type=type(entry.default), default=entry.default, help=f"{OPTION_HELP[entry.name]} (%(default)s)"
        )


def run(arguments: argparse.Namespace) -> int:
    """Train, and say how to evaluate."""
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger

    from ssmkit.train.trajectory import Hardware, TrainOptions, fit

    options = TrainOptions(**{entry.name: getattr(arguments, entry.name) for entry in fields(TrainOptions)})
    run_folder = Path(arguments.out)
    data = training_data(arguments, run_folder)
    torch.manual_seed(options.seed)
    model = model_for(arguments.model, arguments.variant, data, parse_settings(arguments.set))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if process_rank() == 0:
        print(summary(data))
        print(f"{arguments.model}: {parameters:,} parameters, window of {model.config.context} steps")
    devices = int(arguments.devices) if arguments.devices.isdigit() else arguments.devices
    hardware = Hardware(
        accelerator=arguments.accelerator, devices=devices, precision=arguments.precision, workers=arguments.workers
    )
    logger: Any = {"csv": None, "none": False}.get(arguments.logger)
    if arguments.logger == "tensorboard":
        logger = TensorBoardLogger(run_folder, name="logs")
    fit(
        model,
        data,
        run_folder,
        options,
        source=arguments.data,
        hardware=hardware,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        logger=logger,
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


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """["dim=256", "embedding=linear"] as {"dim": 256, "embedding": "linear"}."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            settings[name] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings
