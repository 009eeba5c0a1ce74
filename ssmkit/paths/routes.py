"""Curves, the sets of paths that published models scan along, and routes made of paths."""

import numpy as np
import torch
from torch import Tensor

from ssmkit.paths.families import CORNERS, column, row, snake
from ssmkit.paths.given import Indices, sizes
from ssmkit.paths.kept import kept
from ssmkit.paths.scan_path import ScanPath, ranks_of


@kept
def hilbert(height: int, width: int) -> ScanPath:
    """Generalised Hilbert curve over an image of any size, from the top left along the longer side.

    Follows J. Červený's construction ("gilbert", github.com/jakubcerveny/gilbert). Each step goes to a neighbour,
    and the walk ends at the other end of that side. Where the longer side is odd and the shorter one even there is no
    such walk: one step is diagonal then, or the walk ends elsewhere.
    """
    height, width = sizes(height=height, width=width)
    if height * width == 0:
        return ScanPath.of(np.zeros(0, np.int64), shape=(height, width), name="hilbert")
    lines: list[Indices] = []
    if width >= height:
        _hilbert(lines, 0, 1, width, width, height)
    else:
        _hilbert(lines, 0, width, height, 1, width)
    return ScanPath.of(np.concatenate(lines), shape=(height, width), name="hilbert")


def _hilbert(lines: list[Indices], start: int, a: int, length: int, b: int, depth: int) -> None:
    """Visit `length` x `depth` tokens from `start` to its neighbour corner along `a`; a and b are steps between tokens."""
    if depth == 1:
        lines.append(start + a * np.arange(length))
    elif length == 1:
        lines.append(start + b * np.arange(depth))
    elif 2 * length > 3 * depth:
        # Long: two halves, one after the other, the first of even length so that it ends at its lower corner.
        half = _even(_half(length, a), length)
        _hilbert(lines, start, a, half, b, depth)
        _hilbert(lines, start + half * a, a, length - half, b, depth)
    else:
        # Up along b, across, and down again.
        half, up = _half(length, a), _even(_half(depth, b), depth)
        _hilbert(lines, start, b, up, a, half)
        _hilbert(lines, start + up * b, a, length, b, depth - up)
        _hilbert(lines, start + (length - 1) * a + (up - 1) * b, -b, up, -a, length - half)


def _half(size: int, step: int) -> int:
    """Half of an odd size is the larger half where the curve runs backwards, as in the published construction."""
    return size // 2 if step > 0 else (size + 1) // 2


def _even(half: int, size: int) -> int:
    return half + 1 if half % 2 and size > 2 else half


@kept
def random(height: int, width: int, *, seed: int) -> ScanPath:
    """A random order, the same for the same seed."""
    height, width = sizes(height=height, width=width)
    tokens = np.random.default_rng(seed).permutation(height * width)
    return ScanPath.of(tokens, shape=(height, width), name=f"random of seed {seed}")


@kept
def cross(height: int, width: int) -> tuple[ScanPath, ScanPath, ScanPath, ScanPath]:
    """The four paths of VMamba's cross_scan (arXiv:2401.10166): rows, columns, rows backwards, columns backwards."""
    paths = row(height, width), column(height, width)
    return (*paths, paths[0].flip(), paths[1].flip())


@kept
def continuous(height: int, width: int) -> tuple[ScanPath, ScanPath, ScanPath, ScanPath]:
    """The four paths of PlainMamba (arXiv:2403.17695): snake by rows, backwards, snake by columns, backwards."""
    rows, columns = snake(height, width), snake(height, width, by="column")
    return rows, rows.flip(), columns, columns.flip()


@kept
def zigzag8(height: int, width: int) -> tuple[ScanPath, ...]:
    """The eight paths of ZigMa (arXiv:2403.13802): from each corner the snakes by rows and by columns.

    Corners come as top left, top right, bottom left, bottom right.
    """
    return tuple(snake(height, width, by=by, corner=corner) for corner in CORNERS for by in ("row", "column"))


@kept
def hilbert8(size: int, *, ranks: bool = False) -> tuple[ScanPath, ...]:
    """The Hilbert curve of a square image in eight positions: turned by 0, 90, 180, 270 degrees, each also transposed.

    ZigMa (arXiv:2403.13802) gathers by the table of ranks (the place of each token on the curve) where a walk along
    the curve gathers by its inverse. Its weights therefore need `ranks=True`.
    """
    (size,) = sizes(size=size)
    along_columns = ranks_of(hilbert(size, size)._visits()).reshape(size, size).T  # starts downwards, as ZigMa's
    tables = []
    for turns in range(4):
        turned = np.rot90(along_columns, turns)
        tables += [turned, turned.T]
    paths = []
    for number, table in enumerate(tables):
        flat = table.reshape(-1)
        tokens = flat if ranks else np.argsort(flat)
        paths.append(ScanPath.of(tokens, shape=(size, size), name=f"hilbert {number} of 8"))
    return tuple(paths)


@kept
def concatenate(*paths: ScanPath, restarts: bool = False) -> ScanPath:
    """One route through the tokens of several paths, one path after the other, in one sequence.

    The tokens of the paths lie one after the other, as after `torch.cat` along the tokens. The state is carried from
    path to path, as MSVMamba (arXiv:2405.14174) does; with `restarts` it starts anew with each. Several paths over the
    same tokens need no copies of them: call the op once per path and hand its final state on as the initial state.
    """
    if not paths:
        raise ValueError("paths must hold at least one path, got none")
    ends = np.cumsum([0, *(len(path) for path in paths)])
    tokens = [path._visits() + offset for path, offset in zip(paths, ends, strict=False)]
    starts = [path._starts + offset for path, offset in zip(paths, ends, strict=False)]
    joints = ends[(ends > 0) & (ends < ends[-1])] if restarts else ends[:0]
    return ScanPath.of(np.concatenate(tokens), restarts=np.concatenate([*starts, joints]), name="concatenated")


MOVES = ("start", "right", "left", "up", "down")


def moves(path: ScanPath) -> Tensor:
    """The move that led to each position of a walk over an image, as an index into `MOVES`; restarts are moves too.

    PlainMamba (arXiv:2403.17695) adds a learned vector per move to B.

    Returns:
        (length,)    int64, on the CPU
    Raises:
        ValueError: the path has no shape (height, width), or jumps.
    """
    if path.shape is None or len(path.shape) != 2:
        raise ValueError(f"path must have a shape (height, width), got {path.shape}")
    i, j = np.divmod(path._visits(), max(path.shape[1], 1))
    di, dj = np.diff(i), np.diff(j)
    far = np.flatnonzero(abs(di) + abs(dj) != 1)
    if len(far):
        p = int(far[0])
        raise ValueError(
            f"path must go from neighbour to neighbour; from position {p} to {p + 1} it goes from "
            f"({i[p]}, {j[p]}) to ({i[p + 1]}, {j[p + 1]}). A snake has no jumps."
        )
    codes = np.zeros(len(path), np.int64)
    codes[1:] = np.select([dj == 1, dj == -1, di == -1], [1, 2, 3], 4)
    return torch.from_numpy(codes)
