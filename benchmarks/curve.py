"""How the time of a vision backbone grows with its image: python -m benchmarks.curve vim_tiny vmamba_tiny_s1l8.

Forward without gradients, of as many images of each side as have the pixels of one of the largest, so that what is done
once per call weighs alike. The sides take turns in every round, so that what else the machine does falls on all. The median
over rounds is told per token (a cell of the first feature level), beside that of the smallest image.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from ssmkit.models import create_model
from ssmkit.models.registry import takes
from ssmkit.train.report import pyplot, save_figure

SIDES = (64, 128, 256, 512, 1024)


@torch.no_grad()
def curve(name: str, sides: tuple[int, ...], rounds: int) -> dict[int, float]:
    """Seconds per token by side."""
    # Position embeddings are of one size; every other parameter serves all.
    models = {}
    for side in sides:
        sized = {"img_size": side} if takes(name, "img_size") else {}
        models[side] = create_model(name, **sized).eval()
        models[side].load_state_dict(
            {k: v for k, v in models[sides[0]].state_dict().items() if v.shape == models[side].state_dict()[k].shape},
            strict=False,
        )
    counts = {side: (max(sides) // side) ** 2 for side in sides}
    images = {side: torch.randn(counts[side], 3, side, side) for side in sides}
    seconds: dict[int, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            began = time.perf_counter()
            models[side](images[side])
            if turn:  # the first fills caches
                seconds[side].append(time.perf_counter() - began)
    reduction = models[sides[0]].feature_info[0]["reduction"]
    tokens = {side: counts[side] * (side // reduction) ** 2 for side in sides}
    return {side: statistics.median(taken) / tokens[side] for side, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", metavar="PNG", help="where to draw the curves")
    arguments = parser.parse_args()
    curves = {name: curve(name, tuple(arguments.sides), arguments.rounds) for name in arguments.models}
    print(f"{torch.get_num_threads()} threads, microseconds per token (times that of the smallest image)")
    for name, times in curves.items():
        first = next(iter(times.values()))
        cells = (f"{side}: {taken * 1e6:.2f} ({taken / first:.2f})" for side, taken in times.items())
        print(f"{name:24} " + "  ".join(cells))
    if arguments.plot:
        figure, axes = pyplot().subplots(figsize=(6, 4))
        for name, times in curves.items():
            axes.plot(list(times), [taken * 1e6 for taken in times.values()], marker="o", label=name)
        axes.set(xlabel="side of the image, pixels", ylabel="microseconds per token", xscale="log", yscale="log")
        axes.legend()
        save_figure(figure, Path(arguments.plot))


if __name__ == "__main__":
    main()
