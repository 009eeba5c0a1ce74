"""Pictures of paths."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssmkit.paths.scan_path import ScanPath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 3.0  # side of the picture of one path


def plot(
    paths: ScanPath | Sequence[ScanPath],
    height: int | None = None,
    width: int | None = None,
    *,
    titles: Sequence[str] | None = None,
) -> "Figure":
    """Draw paths side by side, the frames of a clip from left to right.

    A line follows the walk and breaks at restarts; a circle marks the start, a cross the end, squares the restarts.

    Args:
        paths: One path or several.
        height, width: Sizes of the image, for paths that have no shape.
        titles: A title for each path; its own name by default.
    Returns:
        A matplotlib figure; `figure.savefig("paths.png")` writes it, a notebook shows it.
    Raises:
        ValueError: a path has no shape and none is given, another number of tokens, or another number of titles.
        ImportError: matplotlib is not installed.
    """
    paths = [paths] if isinstance(paths, ScanPath) else list(paths)
    if not paths:
        raise ValueError("paths must hold at least one path, got none")
    titles = [path.name + (" backwards" if path.reversed else "") for path in paths] if titles is None else titles
    if len(titles) != len(paths):
        raise ValueError(f"titles must hold one for each of {len(paths)} paths, got {len(titles)}")
    shapes = [_shape(path, height, width) for path in paths]
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ssmkit[train]'") from error
    frames = [shape[0] for shape in shapes]
    figure = Figure(figsize=(INCHES * sum(frames), INCHES), layout="constrained")
    axes = figure.subplots(1, len(paths), squeeze=False, width_ratios=frames)[0]
    for ax, path, title, (nframes, rows, columns) in zip(axes, paths, titles, shapes, strict=True):
        frame, place = np.divmod(path.tokens().numpy(), max(rows * columns, 1))
        y, x = np.divmod(place, max(columns, 1))
        x = x + frame * (columns + 1)
        starts = path.restart_positions().numpy()
        inner = starts[starts > 0]
        for segment in np.split(np.arange(len(path)), inner):
            ax.plot(x[segment], y[segment], color="tab:blue", linewidth=1.0, label="walk")
        ax.plot(x[starts], y[starts], "s", color="tab:orange", markersize=4, label="restarts")
        ax.plot(x[:1], y[:1], "o", color="tab:green", markersize=6, label="start")
        ax.plot(x[-1:], y[-1:], "x", color="tab:red", markersize=6, label="end")
        ax.set_title(title, fontsize="small")
        ax.set_xlim(-0.7, nframes * (columns + 1) - 1.3)
        ax.set_ylim(rows - 0.3, -0.7)
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _shape(path: ScanPath, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(frames, height, width) of what the path walks over."""
    if (height is None) != (width is None):
        raise ValueError(f"height and width go together, got height {height} and width {width}")
    shape = path.shape if height is None or width is None else (height, width)
    if shape is None:
        raise ValueError(f"path has no shape: give height and width, whose product is {len(path)}")
    if len(shape) not in (2, 3) or np.prod(shape) != len(path):
        raise ValueError(f"a path over {len(path)} tokens cannot be drawn as {' x '.join(map(str, shape))}")
    frames, rows, columns = (1, *shape) if len(shape) == 2 else shape
    return max(frames, 1), rows, columns
