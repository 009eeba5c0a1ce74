"""ssmkit train language: a byte-level language model from text files."""

import argparse
from pathlib import Path

import torch

from ssmkit.data.text import Text, split_text, text_files
from ssmkit.models.language import VARIANTS, language_model
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
from ssmkit.train.options import LanguageOptions

DESCRIPTION = """\
Train a language model on the bytes of text files. What it reaches is reported in bits per byte of a held-out part,
beside what gzip -9 needs for it."""

EPILOG = """\
examples:
  ssmkit train language --data stdlib --out runs/stdlib
  ssmkit train language --data notes/ letters/*.txt --held-out 0.1 --out runs/notes
  ssmkit train language --data book.txt --variant byte-hybrid --set d_model=384 --steps 3000 --out runs/book
  ssmkit train language --data "src/**/*.py" --valid "other/**/*.py" --precision bf16-mixed --out runs/code

A training that was killed goes on, to the same numbers, with the same command and --resume."""

# Fields of LanguageOptions that other trainings lack -> help text.
OPTION_HELP = {
    "context": "bytes per window",
    "valid_every": "steps between looks at the held-out text",
    "valid_bytes": "how much of it each look reads; the end reads all",
    "sample_bytes": "how much the model writes at each look; 0 for nothing",
    "carry_state": "windows follow one another, each with the state of the one before (for models without attention)",
}
DEFAULT_VARIANT = "byte-hybrid"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    data = parser.add_argument_group("data")
    sources = "files, folders, patterns like 'src/**/*.py', or stdlib: the sources of Python's standard library"
    data.add_argument("--data", required=True, nargs="+", metavar="SOURCE", help=sources)
    data.add_argument("--valid", nargs="+", metavar="SOURCE", help="held-out text, in place of a part of the data")
    data.add_argument("--held-out", type=float, default=0.05, metavar="FRACTION", help="of the data (%(default)s)")
    data.add_argument(
        "--split",
        choices=["file", "tail"],
        help="hold out whole files, or the end of each (files, if some are small enough)",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--variant", default=DEFAULT_VARIANT, help=f"named sizes (%(default)s): {', '.join(VARIANTS)}")
    add_settings(model, "d_model=384 n_layer=8")
    add_run_arguments(parser)
    add_options(parser, LanguageOptions, OPTION_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say what was reached."""
    from ssmkit.train.language import fit

    options = options_from(arguments, LanguageOptions)
    text, held_out = texts(arguments)
    torch.manual_seed(options.seed)
    model = language_model(arguments.variant, **{"vocab_size": 256, **parse_settings(arguments.set)})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if process_rank() == 0:
        for name, part in (("training", text), ("held out", held_out)):
            print(f"{name}: {part.nbytes:,} bytes of {len(part.pieces)} files")
        print(f"{arguments.variant}: {parameters:,} parameters, windows of {options.context} bytes")
    results = fit(
        model,
        text,
        held_out,
        arguments.out,
        options,
        source=" ".join(arguments.data),
        hardware=hardware_from(arguments),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        logger=logger_from(arguments),
        say=print,
    )
    if results is not None:
        print(f"{results}\ntrained; next: ssmkit generate {arguments.out} --prompt TEXT")
    return 0


def texts(arguments: argparse.Namespace) -> tuple[Text, Text]:
    """Training text and held-out text; a file in both is held out."""
    files = text_files(arguments.data)
    if not arguments.valid:
        return split_text(files, arguments.held_out, arguments.split)
    held_out = text_files(arguments.valid)
    same = {path.resolve() for path in held_out}
    kept = [path for path in files if path.resolve() not in same]
    if not kept:
        raise ValueError(f"every file of --data is in --valid too; nothing is left to train on: {Path(files[0])}, ...")
    return Text.of(*kept), Text.of(*held_out)
