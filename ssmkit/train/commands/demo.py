"""ssmkit demo: the whole job on a small task, in a few minutes on a CPU."""

import argparse
import time
from pathlib import Path

from ssmkit.train.demo import DemoOptions, run_demo

DESCRIPTION = """\
Records trajectories of a pendulum whose velocity is hidden, by a scripted behaviour of mixed quality; trains behaviour
cloning and Decision Mamba on them, with several seeds; evaluates all of them in the simulator; prints a table and writes
a learning curve, the return reached against the return asked for, and a moving picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    defaults = DemoOptions()
    parser.description = DESCRIPTION
    parser.epilog = "example:\n  ssmkit demo --out runs/demo --seeds 5 --steps 1000"
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where to write (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="trainings per model (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="steps of Decision Mamba (default: %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=defaults.episodes, help="recorded (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run it and say how long it took."""
    for name in ("seeds", "steps", "episodes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    began = time.perf_counter()
    options = DemoOptions(seeds=arguments.seeds, steps=arguments.steps, episodes=arguments.episodes)
    run_demo(Path(arguments.out), options)
    print(f"took {time.perf_counter() - began:.0f} s")
    return 0
