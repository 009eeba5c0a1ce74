"""ssmkit train video: a classifier of clips."""

import argparse

from ssmkit.models import list_models
from ssmkit.train.commands.arguments import add_options, add_run_arguments, options_from
from ssmkit.train.commands.train_vision import OPTION_HELP, add_data, add_model, load_size, train
from ssmkit.train.options import VisionOptions

DESCRIPTION = """\
Train a backbone to tell the classes of clips: of a folder with one sub-folder per class (video files, or folders of
frames), or of scikit-learn's handwritten digits in motion, whose class is the digit and its direction: a single frame
shows the digit alone."""

EPILOG = """\
examples:
  ssmkit train video --data moving-digits --clips-per-image 8 --model videomamba_tiny --size 16 --frames 4 \\
      --set patch_size=4 depth=4 embed_dim=128 drop_path_rate=0 scan_order=temporal --augment none --label-smoothing 0 \\
      --steps 1500 --batch-size 48 --lr 2e-3 --out runs/moving
  ssmkit train video --data clips/ --model videomamba_small --size 224 --frames 8 --augment full --out runs/clips
  ssmkit classify runs/clips clip.mp4

A training that was killed goes on, to the same numbers, with the same command and --resume."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_data(parser, "a folder of clips by class, or moving-digits")
    parser.add_argument("--directions", type=int, default=4, help="of moving digits: 4 or 8 (%(default)s)")
    parser.add_argument(
        "--clips-per-image", type=int, default=1, help="of moving digits, per image and direction (%(default)s)"
    )
    parser.add_argument(
        "--sampling", default="uniform", choices=["uniform", "dense"], help="frames of a video file (%(default)s)"
    )
    names = [name for name in list_models("videomamba*") if not name.endswith("_image")]
    add_model(parser, names)
    add_run_arguments(parser)
    add_options(parser, VisionOptions, OPTION_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say what was reached."""
    from ssmkit.data.clips import clip_folder, moving_digits

    options, share, seed = options_from(arguments, VisionOptions), arguments.held_out, arguments.seed
    if arguments.data == "moving-digits":
        data = moving_digits(options.frames, options.size, arguments.directions, share, seed, arguments.clips_per_image)
    else:
        data = clip_folder(
            arguments.data,
            options.frames,
            options.size,
            arguments.sampling,
            share,
            seed,
            load_size=load_size(arguments),
        )
    return train("video", data, arguments, options)
