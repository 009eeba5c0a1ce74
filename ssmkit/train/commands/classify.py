"""ssmkit classify: what a trained classifier makes of images or clips."""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

EPILOG = """\
examples:
  ssmkit classify runs/digits three.png
  ssmkit classify runs/clips clip.mp4 another.mp4 --top 3

RUN is a run folder of `ssmkit train vision` or `ssmkit train video`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="run folder, or checkpoint file")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="images; for a model of clips video files or folders of frames"
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K likeliest classes (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, ... (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """One line per file: its likeliest classes and their probabilities."""
    from ssmkit.train.vision import load_trained

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    model, normalise, description = load_trained(arguments.run)
    model, normalise = model.to(arguments.device), normalise.to(arguments.device)
    classes = description["data"]["classes"]
    for file in arguments.files:
        x = read(file, description).unsqueeze(0).to(arguments.device)
        with torch.no_grad():
            shares = model(normalise(x)).float().softmax(1)[0]
        best = shares.topk(min(arguments.top, len(classes)))
        told = ", ".join(
            f"{classes[index]} {share:.3f}" for share, index in zip(*map(Tensor.tolist, best), strict=True)
        )
        print(f"{file}: {told}")
    return 0


def read(file: str, description: dict[str, Any]) -> Tensor:
    """A file as the held-out samples of the training were read."""
    from ssmkit.data.clips import read_clip
    from ssmkit.data.images import read_image

    options = description["options"]
    if description["kind"] == "video":
        return read_clip(file, np.full(options["frames"], 0.5), options["size"], None)
    return read_image(file, options["size"])
