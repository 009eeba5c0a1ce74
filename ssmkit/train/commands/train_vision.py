"""ssmkit train vision: a classifier of images."""

import argparse
from typing import Any

from ssmkit.models import list_models
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
from ssmkit.train.options import VisionOptions

DESCRIPTION = """\
Train a backbone to tell the classes of images: of a folder with one sub-folder per class (or train/ and val/ with these),
or of the handwritten digits that come with scikit-learn. The run folder gets the held-out accuracy, the confusion matrix
and the effective receptive fields as PNG."""

EPILOG = """\
examples:
  ssmkit train vision --data digits --model vim_tiny --size 32 --set patch_size=4 --out runs/digits
  ssmkit train vision --data photos/ --model vmamba_tiny_s1l8 --size 224 --augment full --cutmix 1 --out runs/photos
  ssmkit classify runs/photos photo.jpg

A training that was killed goes on, to the same numbers, with the same command and --resume."""

# Fields of VisionOptions that other trainings lack -> help text.
OPTION_HELP = {
    "size": "height and width that samples get",
    "frames": "frames of a clip",
    "augment": "none, light or full",
    "mixup": "alpha of mixup's shares; 0: off",
    "cutmix": "alpha of cutmix's shares; 0: off",
    "label_smoothing": "share of the target that goes to all classes",
    "valid_every": "steps between looks at the held-out samples",
    "valid_samples": "how many of them each look classifies; the end classifies all",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_data(parser, "a folder of images by class, or digits")
    add_model(parser, [name for name in list_models() if not name.startswith("videomamba") or name.endswith("_image")])
    add_run_arguments(parser)
    add_options(parser, VisionOptions, OPTION_HELP, without=("frames",))


def run(arguments: argparse.Namespace) -> int:
    """Train, and say what was reached."""
    from ssmkit.data.images import digits, image_folder

    share, seed, size = arguments.held_out, arguments.seed, arguments.size
    if arguments.data == "digits":
        data = digits(size, share, seed)
    else:
        data = image_folder(arguments.data, size, share, seed, load_size=load_size(arguments))
    return train("vision", data, arguments, options_from(arguments, VisionOptions))


def load_size(arguments: argparse.Namespace) -> int:
    """Height and width that training samples are read at: a seventh more than is shown, where views are cut out of them."""
    return int(arguments.size if arguments.augment == "none" else arguments.size * 8 // 7)


def add_data(parser: argparse.ArgumentParser, sources: str) -> None:
    """--data and --held-out."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, metavar="SOURCE", help=sources)
    group.add_argument(
        "--held-out", type=float, default=0.2, metavar="FRACTION", help="of a folder without val/ (%(default)s)"
    )


def add_model(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """--model and --set."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="NAME", help=f"one of {', '.join(names)}")
    add_settings(group, "depth=12 drop_path_rate=0.1")


def train(kind: Any, data: Any, arguments: argparse.Namespace, options: VisionOptions) -> int:
    """Train on samples that have been found, and say what was reached."""
    from ssmkit.train.vision import fit

    if process_rank() == 0:
        print(f"{len(data.train):,} samples of {len(data.classes)} classes, {len(data.held_out):,} held out")
    _, results = fit(
        kind,
        arguments.model,
        data,
        arguments.out,
        options,
        settings=parse_settings(arguments.set),
        source=str(arguments.data),
        hardware=hardware_from(arguments),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        logger=logger_from(arguments),
        say=print,
    )
    if results is not None:
        print(f"{results}\ntrained; next: ssmkit classify {arguments.out} FILE")
    return 0
