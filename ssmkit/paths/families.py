"""Paths over images and clips.

Tokens lie row by row, token i * width + j at row i and column j; those of a clip frame by frame. Where an order is
affine the path holds no table. All sizes may be anything, 0 and 1 too.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkit.paths.given import Indices, sizes
from ssmkit.paths.kept import hashable, kept
from ssmkit.paths.scan_path import ScanPath, Strides


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a word that is not known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _places(height: int, width: int) -> tuple[Indices, Indices]:
    """Row and column of each token."""
    i, j = np.divmod(np.arange(height * width), max(width, 1))
    return i, j


def _ascending(*keys: Indices) -> Indices:
    """The tokens sorted by the first key, then the second, ..."""
    return np.lexsort(keys[::-1])


def _borders(tokens: Indices, *keys: Indices) -> Indices:
    """The positions at which any of the keys is not what it was one position before."""
    changed = np.zeros(max(len(tokens) - 1, 0), np.bool_)
    for key in keys:
        changed |= np.diff(key[tokens]) != 0
    return np.flatnonzero(changed) + 1


def _every(step: int, length: int) -> Indices:
    """Positions step, 2 step, ... below length."""
    return np.arange(step, length, step) if step else np.zeros(0, np.int64)


CORNERS = ("top left", "top right", "bottom left", "bottom right")


def _first(corner: str, height: int, width: int) -> tuple[int, int, int]:
    """The token in a corner, and the signs of the steps down and right that lead away from it."""
    one_of("corner", corner, CORNERS)
    down, right = (-1 if corner.startswith("bottom") else 1), (-1 if corner.endswith("right") else 1)
    start = (max(height - 1, 0) * width if down < 0 else 0) + (max(width - 1, 0) if right < 0 else 0)
    return start, down, right


@kept
def row(height: int, width: int, *, corner: str = "top left", restarts: bool = False) -> ScanPath:
    """Row by row: position t visits token t.

    Args:
        height, width: Sizes of the image.
        corner: "top left", "top right", "bottom left" or "bottom right", where the walk starts.
        restarts: The state starts anew with each row.
    """
    height, width = sizes(height=height, width=width)
    start, down, right = _first(corner, height, width)
    starts = _every(width if restarts else 0, height * width)
    if down < 0 and right < 0:
        return row(height, width, restarts=restarts).flip()
    walk = Strides((height, width), (down * width, right), start)
    return ScanPath.of(walk, restarts=starts, shape=(height, width), name=_named("row", corner))


@kept
def column(height: int, width: int, *, corner: str = "top left", restarts: bool = False) -> ScanPath:
    """Column by column: position t visits token (t mod height) * width + t // height.

    Args:
        height, width: Sizes of the image.
        corner: "top left", "top right", "bottom left" or "bottom right", where the walk starts.
        restarts: The state starts anew with each column.
    """
    height, width = sizes(height=height, width=width)
    start, down, right = _first(corner, height, width)
    starts = _every(height if restarts else 0, height * width)
    if down < 0 and right < 0:
        return column(height, width, restarts=restarts).flip()
    walk = Strides((width, height), (right, down * width), start)
    return ScanPath.of(walk, restarts=starts, shape=(height, width), name=_named("column", corner))


def _named(name: str, corner: str) -> str:
    return name if corner == "top left" else f"{name} from {corner}"


@kept
def snake(height: int, width: int, *, by: str = "row", corner: str = "top left", restarts: bool = False) -> ScanPath:
    """Line by line from a corner, every second line backwards, so that each step goes to a neighbour.

    Args:
        height, width: Sizes of the image.
        by: "row" or "column", the lines.
        corner: "top left", "top right", "bottom left" or "bottom right", where the walk starts.
        restarts: The state starts anew with each line.
    """
    height, width = sizes(height=height, width=width)
    one_of("by", by, ("row", "column"))
    one_of("corner", corner, CORNERS)
    i, j = _places(height, width)
    i = height - 1 - i if corner.startswith("bottom") else i
    j = width - 1 - j if corner.endswith("right") else j
    line, along = (i, j) if by == "row" else (j, i)
    tokens = _ascending(line, np.where(line % 2 == 0, along, -along))
    starts = _borders(tokens, line) if restarts else ()
    return ScanPath.of(tokens, restarts=starts, shape=(height, width), name=_named(f"snake by {by}", corner))


@kept
def windows(
    height: int,
    width: int,
    window: int | tuple[int, int],
    *,
    between: str = "row",
    inside: str = "row",
    restarts: bool = False,
) -> ScanPath:
    """Window by window, as in LocalMamba (arXiv:2403.09338).

    Windows at the right and lower borders hold what is left of the image where `window` does not divide it: the order
    is that of an image padded to whole windows, less the pads. `padded` is for scans in which pads take part.

    Args:
        height, width: Sizes of the image.
        window: Size of a window, or its (rows, columns).
        between, inside: "row" or "column", the order of the windows and that of the tokens inside each.
        restarts: The state starts anew with each window.
    """
    height, width = sizes(height=height, width=width)
    rows, columns = _window(window)
    one_of("between", between, ("row", "column"))
    one_of("inside", inside, ("row", "column"))
    name = f"windows of {rows} x {columns}"
    if height % rows == 0 and width % columns == 0:
        outer = [(height // rows, rows * width), (width // columns, columns)]
        inner = [(rows, width), (columns, 1)]
        digits = (outer if between == "row" else outer[::-1]) + (inner if inside == "row" else inner[::-1])
        walk = Strides(tuple(size for size, _ in digits), tuple(stride for _, stride in digits))
        starts = _every(rows * columns if restarts else 0, height * width)
        return ScanPath.of(walk, restarts=starts, shape=(height, width), name=name)
    i, j = _places(height, width)
    which, where = (i // rows, j // columns), (i % rows, j % columns)
    which = which if between == "row" else which[::-1]
    tokens = _ascending(*which, *(where if inside == "row" else where[::-1]))
    return ScanPath.of(tokens, restarts=_borders(tokens, *which) if restarts else (), shape=(height, width), name=name)


def _window(window: int | tuple[int, int]) -> tuple[int, int]:
    pair = window if isinstance(window, tuple) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window must be a size or a pair (rows, columns), got {window!r}")
    rows, columns = (sizes(1, window=side)[0] for side in pair)
    return rows, columns


class Padded(NamedTuple):
    """Sizes of an image padded to whole windows, and which of its tokens, row by row, are real."""

    height: int
    width: int
    real: Tensor


def padded(height: int, width: int, window: int | tuple[int, int]) -> Padded:
    """The image after padding on the right and below until `window` divides it.

    `windows(*padded(h, w, window)[:2], window)` walks it with the pads in their places, as LocalMamba does; an op given
    `real` as its `mask` passes over them, which is `windows(h, w, window)` on the image without pads.

    Returns:
        height, width, and real    (height * width,)    bool, on the CPU
    """
    height, width = sizes(height=height, width=width)
    rows, columns = _window(hashable(window))
    tall, wide = -(-height // rows) * rows, -(-width // columns) * columns
    i, j = _places(tall, wide)
    return Padded(tall, wide, torch.from_numpy((i < height) & (j < width)))


@kept
def atrous(height: int, width: int, step: int, *, inside: str = "row", restarts: bool = True) -> ScanPath:
    """The sub-grids of every `step`-th row and column one after the other, as EfficientVMamba (arXiv:2403.09977) skips.

    Sub-grids come by their first token: column of it first, then row, so (0, 0), (1, 0), ..., (0, 1), (1, 1), ...

    Args:
        height, width: Sizes of the image.
        step: Distance between neighbours in a sub-grid.
        inside: "row" or "column", the order of the tokens in each sub-grid, or "alternate": by column in those whose
            first row is odd, as EfficientVMamba does with step 2.
        restarts: The state starts anew with each sub-grid.
    """
    height, width = sizes(height=height, width=width)
    (step,) = sizes(1, step=step)
    one_of("inside", inside, ("row", "column", "alternate"))
    name = f"atrous of step {step}"
    if height % step == 0 and width % step == 0 and inside != "alternate":
        digits = [(step, 1), (step, width), (height // step, step * width), (width // step, step)]
        if inside == "column":
            digits[2:] = digits[:1:-1]
        walk = Strides(tuple(size for size, _ in digits), tuple(stride for _, stride in digits))
        starts = _every(height * width // step**2 if restarts else 0, height * width)
        return ScanPath.of(walk, restarts=starts, shape=(height, width), name=name)
    i, j = _places(height, width)
    which, where = (j % step, i % step), (i // step, j // step)
    by_column = (which[1] % 2 == 1) if inside == "alternate" else np.full(i.shape, inside == "column")
    tokens = _ascending(*which, np.where(by_column, where[1], where[0]), np.where(by_column, where[0], where[1]))
    return ScanPath.of(tokens, restarts=_borders(tokens, *which) if restarts else (), shape=(height, width), name=name)


@kept
def diagonals(
    height: int, width: int, *, mirror: bool = False, zigzag: bool = True, restarts: bool = False
) -> ScanPath:
    """Diagonal by diagonal i + j = 0, 1, 2, ... from the top left.

    Args:
        height, width: Sizes of the image.
        mirror: From the top right instead, the same picture with left and right exchanged.
        zigzag: Diagonals with even i + j run upwards and the others downwards, as in MHS-VM (arXiv:2406.05992); all of
            them run upwards without it.
        restarts: The state starts anew with each diagonal.
    """
    height, width = sizes(height=height, width=width)
    i, j = _places(height, width)
    which = i + (width - 1 - j if mirror else j)
    tokens = _ascending(which, np.where((which % 2 == 1) & zigzag, i, -i))
    starts = _borders(tokens, which) if restarts else ()
    name = ("zigzag " if zigzag else "") + "diagonals" + (" mirrored" if mirror else "")
    return ScanPath.of(tokens, restarts=starts, shape=(height, width), name=name)


@kept
def spiral(height: int, width: int, *, clockwise: bool = True, outward: bool = False) -> ScanPath:
    """Along the border, then the border of what is left, ... to the middle.

    Args:
        height, width: Sizes of the image.
        clockwise: From the top left to the right; otherwise from the bottom left to the right, with top and bottom
            exchanged.
        outward: The same walk backwards, from the middle.
    """
    height, width = sizes(height=height, width=width)
    i, j = _places(height, width)
    i = i if clockwise else height - 1 - i
    ring = np.minimum.reduce([i, j, height - 1 - i, width - 1 - j])
    across, down = width - 1 - 2 * ring, height - 1 - 2 * ring  # steps along the sides of the ring
    i, j = i - ring, j - ring
    along = np.select([i == 0, j == across, i == down], [j, across + i, 2 * across + down - j], 2 * (across + down) - i)
    name = ("clockwise" if clockwise else "anticlockwise") + (" spiral from within" if outward else " spiral")
    path = ScanPath.of(_ascending(ring, along), shape=(height, width), name=name)
    return path.flip() if outward else path


@kept
def clip(
    frames: int, height: int, width: int, order: str = "thw", *, snake: bool = False, restarts: str = ""
) -> ScanPath:
    """A clip in any order of its axes: frames t, rows h, columns w.

    Args:
        frames, height, width: Sizes of the clip.
        order: The axes from the slowest to the fastest: "thw" (frame by frame, row by row), "hwt" (all frames of a
            place, then the next place), "twh", "wht", "htw" or "wth".
        snake: Every second run along an axis goes backwards, so that each step goes to a neighbour.
        restarts: The first letters of `order`; the state starts anew whenever one of these axes steps. "" never, with
            order "thw" "t" at each frame and "th" at each row.
    """
    frames, height, width = sizes(frames=frames, height=height, width=width)
    known = ("thw", "twh", "htw", "hwt", "wth", "wht")
    one_of("order", order, known)
    one_of("restarts", restarts, ("", order[:1], order[:2]))
    shape = (frames, height, width)
    extent = {"t": (frames, height * width), "h": (height, width), "w": (width, 1)}
    (n0, s0), (n1, s1), (n2, s2) = (extent[axis] for axis in order)
    run = {"": 0, order[:1]: n1 * n2, order[:2]: n2}[restarts]
    starts = _every(run, frames * height * width)
    name = f"clip by {order}"
    if not snake:
        return ScanPath.of(Strides((n0, n1, n2), (s0, s1, s2)), restarts=starts, shape=shape, name=name)
    i, j, k = np.indices((n0, n1, n2)).reshape(3, -1)
    j = np.where(i % 2 == 0, j, n1 - 1 - j)
    lines = np.arange(n0 * n1).repeat(n2)
    k = np.where(lines % 2 == 0, k, n2 - 1 - k)
    return ScanPath.of(i * s0 + j * s1 + k * s2, restarts=starts, shape=shape, name=f"snake {name}")
