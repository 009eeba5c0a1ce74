"""The `ssmkit` command: a registry of subcommands, each imported only when it is chosen.

A subcommand is a module with `add_arguments(parser)` and `run(arguments) -> exit status`, or, where it has its own
command line, with `main(argv) -> exit status`.
"""

import argparse
import importlib
import os
import sys
from typing import Any, NamedTuple

from ssmkit import __version__


class Command(NamedTuple):
    """A subcommand: what it does in one line, the module that does it, and whether that parses its own arguments."""

    summary: str
    module: str
    own_parser: bool = False


COMMANDS = {
    "record": Command("record trajectories of a task into a file", "ssmkit.train.commands.record"),
    "train": Command("train a model; resumes where a killed training stopped", "ssmkit.train.commands.train"),
    "evaluate": Command("roll a trained model out in its environment", "ssmkit.train.commands.evaluate"),
    "generate": Command("let a language model write on from a prompt", "ssmkit.train.commands.generate"),
    "classify": Command("tell the classes of images or clips", "ssmkit.train.commands.classify"),
    "demo": Command("record, train, evaluate and plot, in a few minutes on a CPU", "ssmkit.train.commands.demo"),
    "bench": Command("time an op against its rivals and the machine's limit", "ssmkit.benchmarks.cli"),
    "doctor": Command("show what can run here, and why the rest cannot", "ssmkit.doctor", own_parser=True),
}

EPILOG = """\
examples:
  ssmkit demo --out runs/demo
  ssmkit record pendulum --out data/pendulum.npz
  ssmkit train trajectory --data data/pendulum.npz --model decision-mamba --out runs/pendulum
  ssmkit evaluate runs/pendulum --targets -150 -400 -900
  ssmkit train language --data stdlib --out runs/stdlib
  ssmkit generate runs/stdlib --prompt "def main("
  ssmkit train vision --data digits --model vim_tiny --size 32 --set patch_size=4 --out runs/digits
  ssmkit classify runs/digits picture.png
  ssmkit bench selective_scan

`ssmkit COMMAND --help` explains each command."""


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the `chosen` command filled in (importing all would be slow)."""
    parser = argparse.ArgumentParser(
        prog="ssmkit",
        description="State-space sequence models: record data, train, evaluate, write, measure.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssmkit {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        child = subparsers.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=not command.own_parser,
        )
        if name == chosen and not command.own_parser:
            import_command(name).add_arguments(child)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; mistakes of the caller end with a message and status 2, not with a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        if chosen is not None and COMMANDS[chosen].own_parser:
            status: int = import_command(chosen).main(argv[1:])
            return status
        arguments = build_parser(chosen).parse_args(argv)
        status = import_command(arguments.command).run(arguments)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        print(f"ssmkit: error: {error}; pip install 'ssmkit[trajectory,language,vision]' brings it", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has enough (`| head`). What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"ssmkit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssmkit: interrupted", file=sys.stderr)
        return 130
    return status


def import_command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(COMMANDS[name].module)


if __name__ == "__main__":
    sys.exit(main())
