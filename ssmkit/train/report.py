"""What a training leaves for people: tables, the learning curve, return against target, a moving picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmkit.data.atomic import atomic_write


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text; numbers to one decimal, right-aligned."""
    texts = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] == "" for row in rows) for i in range(len(header))
    ]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, texts)])


def learning_curve(run: Path, column: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values that the CSV logs of a run hold; a resumed run has several, and the later one counts."""
    points: dict[int, float] = {}
    logs = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for log in logs:
        with open(log, newline="") as file:
            for row in csv.DictReader(file):
                if row.get(column):
                    points[int(row["step"])] = float(row[column])
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or an error that says how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ssmkit[train]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, in full or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot().close(figure)


def plot_learning_curves(runs: dict[str, Path], path: Path) -> None:
    """Training loss of each run against its steps."""
    figure, axes = pyplot().subplots(figsize=(6, 4))
    for label, run in runs.items():
        axes.plot(*learning_curve(run), label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Learning curve")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_return_against_target(
    targets: Sequence[float],
    returns: NDArray[np.float64],
    levels: dict[str, float],
    path: Path,
    title: str,
) -> None:
    """Reached against asked, (seeds, targets): mean and spread over seeds, the data's levels, the diagonal."""
    order = np.argsort(targets)
    asked = np.asarray(targets)[order]
    mean, spread = returns.mean(axis=0)[order], returns.std(axis=0)[order]
    figure, axes = pyplot().subplots(figsize=(6, 4.5))
    axes.plot(asked, asked, color="grey", linestyle=":", label="asked = reached")
    axes.errorbar(asked, mean, yerr=spread, marker="o", capsize=3, label="Decision Mamba, mean and std over seeds")
    for number, (label, level) in enumerate(levels.items(), start=1):
        axes.axhline(level, color=f"C{number}", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="target return", ylabel="return reached", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def save_gif(frames: Sequence[NDArray[np.uint8]], path: Path, *, milliseconds: int = 50) -> None:
    """Write RGB frames as a looping GIF, in full or not at all."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("the moving picture needs Pillow: pip install 'ssmkit[train]'") from error
    pictures = [Image.fromarray(frame).quantize(32) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def caption(frame: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """The picture with a line of text above it."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (frame.shape[1], 18), "white")
    ImageDraw.Draw(strip).text((4, 3), text, fill="black")
    return np.concatenate([np.asarray(strip), frame])


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """How often class i (row) was called class j (column), as shares of the row."""
    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(24.0, max(4.0, 0.35 * len(classes)))
    figure, axes = pyplot().subplots(figsize=(side + 1, side))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    ticks = range(len(classes))
    axes.set(xlabel="called", ylabel="is", title="Held-out samples", xticks=ticks, yticks=ticks)
    axes.set_xticklabels(classes, rotation=90)
    axes.set_yticklabels(classes)
    figure.colorbar(image, ax=axes, label="share of the row")
    save_figure(figure, path)


def plot_receptive_fields(fields: Sequence[Any], names: Sequence[str], path: Path) -> None:
    """What the middle cell of each feature level sees, (height, width) each; the scale is logarithmic."""
    figure, panels = pyplot().subplots(1, len(fields), figsize=(3.2 * len(fields), 3.4), squeeze=False)
    for axes, field, name in zip(panels[0], fields, names, strict=True):
        image = axes.imshow(np.log10(np.maximum(np.asarray(field), 1e-4)), vmin=-4, vmax=0, cmap="magma")
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=panels[0].tolist(), label="log10 of |gradient|, relative to the largest")
    save_figure(figure, path)
