"""The command line: `python -m benchmarks OP` in a checkout, `ssmkit bench OP` anywhere."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import document, machine, report
from .candidate import OURS
from .registry import find, names
from .runner import Plan, Runner
from .timing import WINDOW_S
from .worker import ALLOCATORS

DESCRIPTION = """Time an op or a model against its rivals and against what this machine could do at best.

Nothing is timed before it has matched the float64 reference; a rival that does not match is reported as wrong. Every
candidate runs in a process of its own. Windows of ours and of a rival alternate, and ratios are taken within pairs;
pairs during which other programs were busy are repeated.
"""

EXAMPLES = """examples:
  %(prog)s --list
  %(prog)s selective_scan
  %(prog)s selective_scan --mode fwd,fwdbwd --threads 1,2 --json out.json --plot out.png
  %(prog)s selective_scan --shape "130M, 1024" --rivals none --capability avx512,avx2,baseline
  %(prog)s selective_scan --dtype float32,bfloat16 --rivals none
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cores = os.cpu_count() or 1

    def several(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    def counts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in several(text))

    parser.add_argument("op", nargs="?", metavar="OP", help="what to time; --list shows what there is")
    parser.add_argument("--list", action="store_true", help="list the benchmarks with their shapes and rivals")
    parser.add_argument(
        "--mode", type=several, default=("fwd",), metavar="fwd,fwdbwd", help="forward, or forward + backward"
    )
    parser.add_argument("--dtype", type=several, default=("float32",), metavar="NAME,...", help="of the inputs")
    parser.add_argument(
        "--threads", type=counts, default=tuple(sorted({1, cores})), metavar="N,...", help="default: 1 and all cores"
    )
    parser.add_argument(
        "--shape", action="append", default=[], metavar="LABEL", help="only shapes whose label has this"
    )
    parser.add_argument("--rivals", type=several, metavar="NAME,...", help="only these; none for ours alone")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="auto", help="of our op, as in its argument of that name")
    parser.add_argument(
        "--capability", type=several, default=("auto",), metavar="NAME,...",
        help="SIMD level of the compiled library: auto, avx512_bf16, avx512, avx2, baseline; the first is compared with "
        "the rivals, the others with the first",
    )  # fmt: skip
    parser.add_argument(
        "--allocator", default="no mmap", choices=list(ALLOCATORS),
        help="glibc's: with 'no mmap' large temporaries are reused instead of being mapped and faulted in anew",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="pairs of windows per rival (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds of short windows: a first look")
    parser.add_argument(
        "--patience", type=int, default=3, metavar="N",
        help="give up waiting for quiet after N times the rounds (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=10.0, metavar="SECONDS",
        help="a call that takes longer is run once and reported as an upper bound (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--exclusive", action="store_true",
        help="timed windows run under the real-time scheduler (root): on a machine in use, others wait meanwhile",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything that was measured, after each shape"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times")
    parser.add_argument("--file", action="store_true", help="add to the results under benchmarks/results, by machine")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the parsed command; the exit status is 1 where our own op failed or was wrong.

    Raises:
        ValueError: an unknown op, shape, rival, mode or allocator.
    """
    if arguments.list:
        print("\n".join(listing()))
        return 0
    if arguments.op is None:
        raise ValueError("which op? " + ", ".join(names()))
    if arguments.file and not document.in_checkout():
        raise ValueError("--file keeps results in a checkout of the sources; here, name a file with --json")
    plan = Plan(
        bench=arguments.op, modes=arguments.mode, dtypes=arguments.dtype, threads=arguments.threads,
        device=arguments.device, backend=arguments.backend, capabilities=arguments.capability,
        allocator=arguments.allocator, shapes=tuple(arguments.shape),
        rivals=() if arguments.rivals == ("none",) else arguments.rivals,
        rounds=3 if arguments.quick else arguments.rounds, window=WINDOW_S / 5 if arguments.quick else WINDOW_S,
        budget=arguments.budget, patience=arguments.patience, exclusive=arguments.exclusive,
    )  # fmt: skip
    runner = Runner(plan, say=lambda line: print(line, file=sys.stderr, flush=True))
    filed = document.RESULTS / machine.folder_name(plan.device) / f"{plan.bench}.json"
    before = json.loads(filed.read_text()) if arguments.file and filed.is_file() else None

    def keep(results: dict[str, Any]) -> None:
        if arguments.json:
            report.write_json(results, arguments.json)
        if arguments.file:
            report.write_json(report.merged(before, results), filed)

    results = runner.run(keep)
    print(report.text(results))
    if arguments.plot:
        report.plot(results, arguments.plot)
    ours = [row for cell in results["cells"] for row in cell["rows"] if row["name"] == OURS]
    return 0 if ours and all(row["status"] == "ok" for row in ours) else 1


def listing() -> list[str]:
    """Every benchmark with its shapes and rivals."""
    lines = []
    for name in names():
        try:
            bench = find(name)
        except ImportError as reason:
            lines.append(f"{name}: not to be had here ({reason})")
            continue
        lines.append(name)
        for label, sizes in bench.cases():
            lines.append(f"  {label}: " + ", ".join(f"{size} {value}" for size, value in sizes.items()))
        lines.append("  rivals: " + (", ".join(bench.rivals) or "none"))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
