"""Arguments that every `ssmkit train FAMILY` takes, and what they stand for."""

import argparse
import ast
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from ssmkit.train.options import Hardware, StepOptions

Options = TypeVar("Options", bound=StepOptions)

# Field of StepOptions -> help text.
STEP_HELP = {
    "steps": "optimiser steps",
    "batch_size": "windows per step and device",
    "lr": "peak learning rate",
    "weight_decay": "AdamW's decay of matrices",
    "clip": "norm that gradients are clipped to",
    "warmup": "steps of linear warm-up",
    "schedule": "learning rate after warm-up: cosine (down to a tenth) or constant",
    "seed": "fixes weights, batches and dropout",
    "checkpoint_every": "steps between checkpoints",
}


def add_settings(group: Any, example: str) -> None:
    """--set, for fields of a model's config."""
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"fields of the model's config, e.g. {example} (an unknown name lists all)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run is kept, and where it runs."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", required=True, metavar="RUN", help="run folder")
    group.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    group.add_argument("--overwrite", action="store_true", help="delete what the run folder holds and start anew")
    group.add_argument("--accelerator", default="auto", help="cpu, gpu, auto (%(default)s)")
    group.add_argument("--devices", default="auto", help="how many (%(default)s)")
    group.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, 16-mixed (%(default)s)")
    group.add_argument("--workers", type=int, default=0, help="processes that prepare batches (%(default)s)")
    group.add_argument("--logger", default="csv", choices=["csv", "tensorboard", "none"], help="(%(default)s)")


def add_options(
    parser: argparse.ArgumentParser,
    options: type[StepOptions],
    help_texts: dict[str, str],
    *,
    without: tuple[str, ...] = (),
) -> None:
    """One flag per field of `options`: its name with dashes. Fields `without` a flag keep their default."""
    group = parser.add_argument_group("training")
    for entry in fields(options):
        flag, text = f"--{entry.name.replace('_', '-')}", {**STEP_HELP, **help_texts}[entry.name]
        assert entry.default is not MISSING
        if entry.name in without:
            parser.set_defaults(**{entry.name: entry.default})
            continue
        if entry.default is False:
            group.add_argument(flag, action="store_true", help=text)
        else:
            group.add_argument(flag, type=type(entry.default), default=entry.default, help=f"{text} (%(default)s)")


def options_from(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """The options that the flags of `add_options` say."""
    return options(**{entry.name: getattr(arguments, entry.name) for entry in fields(options)})


def hardware_from(arguments: argparse.Namespace) -> Hardware:
    """The hardware that the flags of `add_run_arguments` say."""
    devices = int(arguments.devices) if arguments.devices.isdigit() else arguments.devices
    return Hardware(
        accelerator=arguments.accelerator, devices=devices, precision=arguments.precision, workers=arguments.workers
    )


def logger_from(arguments: argparse.Namespace) -> Any:
    """A Lightning logger: None for the default, CSV files, and False for none."""
    if arguments.logger == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(Path(arguments.out), name="logs")
    return {"csv": None, "none": False}[arguments.logger]


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
