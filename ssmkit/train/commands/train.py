"""ssmkit train: one subcommand per family of models, each in a file of its own."""

import argparse
import importlib
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family of models: what is trained, in a few words, and the module that has its arguments and `run`."""

    summary: str
    module: str


FAMILIES = {
    "trajectory": Family("a policy from recorded trajectories", "ssmkit.train.commands.train_trajectory"),
    "vision": Family("a classifier of images", "ssmkit.train.commands.train_vision"),
    "video": Family("a classifier of clips", "ssmkit.train.commands.train_video"),
    "language": Family("a language model from text files", "ssmkit.train.commands.train_language"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Families of models, each with its arguments."""
    families = parser.add_subparsers(dest="family", metavar="FAMILY", required=True)
    for name, family in FAMILIES.items():
        child = families.add_parser(name, help=family.summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        import_family(name).add_arguments(child)


def run(arguments: argparse.Namespace) -> int:
    """Train a model of the chosen family."""
    status: int = import_family(arguments.family).run(arguments)
    return status


def import_family(name: str) -> Any:
    """The module of a family."""
    return importlib.import_module(FAMILIES[name].module)
