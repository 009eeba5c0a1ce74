"""Text as bytes: files read as one row, training windows, a held-out part, and what gzip makes of it.

A text of files f_1, f_2, ... is the row  0 f_1 0 f_2 ...  : a NUL stands before every file, so that a model knows where
one begins. Predictions are scored in bits per byte,

    (1/n) sum_i -log2 p(b_i | NUL, b_1 .. b_{i-1})        over the n bytes of the files, not their NULs

where what precedes a byte is cut off at a window of `context`; windows overlap by half, so at least half of one is seen.
"""

import errno
import functools
import glob
import hashlib
import itertools
import os
import sysconfig
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["file", "tail"]
STDLIB = "stdlib"
SEPARATOR = 0
BLOCK = 1 << 24  # bytes compressed at a time


class TextError(ValueError):
    """A text that cannot be used; the message names it."""


class Piece(NamedTuple):
    """Bytes first .. first + size of a file."""

    path: Path
    first: int
    size: int


class Stamp(NamedTuple):
    """Which file it is, its size and the time of its last change, by which another content is noticed."""

    inode: int
    size: int
    changed: int  # ns

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """From the answer of stat or fstat."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class Text:
    """Pieces of files as one row of bytes, a NUL before each.

    What is asked for is read from the files each time, so a text may be larger than memory, and processes that were
    forked from this one, or were sent a pickle, read on. A file that is written to meanwhile is refused with a TextError;
    one that is replaced by another under its name is read on as it was where it is still open, else refused.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        # absolute: the folder that the process is in may change
        self.pieces = [piece._replace(path=piece.path.absolute()) for piece in pieces if piece.size > 0]
        if not self.pieces:
            raise TextError(f"a text needs at least one byte, got none in {', '.join(str(p.path) for p in pieces[:3])}")
        sizes = np.array([piece.size for piece in self.pieces], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes + 1)])
        self.stamps = {path: Stamp.of(path.stat()) for path in {piece.path for piece in self.pieces}}

    @classmethod
    def of(cls, *paths: str | Path) -> "Text":
        """The whole of these files."""
        return cls([Piece(path, 0, path.stat().st_size) for path in map(Path, paths)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the files, without the NULs between them."""
        return len(self) - len(self.pieces)

    @property
    def fingerprint(self) -> str:
        """A digest of the names and sizes of the pieces."""
        names = "\n".join(f"{piece.path.name} {piece.first} {piece.size}" for piece in self.pieces)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def contents(self, index: int, at: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        """The bytes of one piece, from `at` on and at most `count` of them."""
        piece = self.pieces[index]
        if not 0 <= at <= piece.size:
            raise ValueError(f"at must lie in 0..{piece.size}, the bytes of {piece.path}, got {at}")
        stamp = self.stamps[piece.path]
        if stamp.size < piece.first + piece.size:
            raise TextError(f"{piece.path} has become shorter since it was opened; start again")
        left = piece.size - at
        return opened(piece.path, stamp).read(piece.first + at, left if count is None else min(count, left))

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """Bytes start .. start + count of the row, which begins again where it ends."""
        row, filled = np.full(count, SEPARATOR, np.uint8), 0
        index = int(np.searchsorted(self.starts, start % len(self), side="right")) - 1
        # Where the wanted bytes begin in the piece; -1 is the NUL before it.
        at = start % len(self) - int(self.starts[index]) - 1
        while filled < count:
            if at < 0:
                filled, at = filled + 1, 0
            part = self.contents(index, at, count - filled)
            row[filled : filled + len(part)] = part
            filled, index, at = filled + len(part), (index + 1) % len(self.pieces), -1
        return row


class OpenFile:
    """A file that is read as it was when its stamp was taken; closed with the last reference."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self.stamp = path, stamp
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise TextError(f"{path} is no longer there; start again") from None
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """Bytes start .. start + count. Nothing is mapped: a mapped file that is cut short would end the process."""
        bytes_read, filled = np.empty(count, np.uint8), 0
        while filled < count:
            got = os.preadv(self.descriptor, [bytes_read[filled:].data], start + filled)
            if got == 0:
                break
            filled += got
        # Looked at afterwards: a change before or during the reading shows.
        if filled < count or Stamp.of(os.fstat(self.descriptor)) != self.stamp:
            raise TextError(f"{self.path} has changed since it was opened; start again")
        return bytes_read


def opened(path: Path, stamp: Stamp) -> OpenFile:
    """A file with this stamp; the files read last stay open, as long as the process may have so many."""
    try:
        return keep_open(path, stamp)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        keep_open.cache_clear()
        return keep_open(path, stamp)


keep_open = functools.lru_cache(maxsize=32)(OpenFile)


def text_files(sources: Sequence[str]) -> list[Path]:
    """The files that sources name: files, folders with all below them, patterns like "src/**/*.py", or "stdlib".

    Folders and patterns leave out hidden files, empty ones, and those that hold a NUL near their start, as binary files
    do. "stdlib" is Python's standard library: its *.py files without tests and installed packages.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if source == STDLIB:
            files = stdlib_files()
        elif path.is_file():
            files = [path]
        elif path.is_dir():
            files = [below for below in path.rglob("*") if not hidden(below.relative_to(path)) and is_text(below)]
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True) if is_text(Path(name))]
        if not files:
            raise FileNotFoundError(f"no text at {source}; give files, folders, patterns or {STDLIB!r}")
        found.update(dict.fromkeys(sorted(files)))
    return list(found)


def stdlib_files() -> list[Path]:
    """The sources of Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts[:-1])]


def hidden(path: Path) -> bool:
    """Whether a part of the path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def is_text(path: Path) -> bool:
    """Whether this is a file, not empty, and without a NUL in its first 8 KiB."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(8192)
    return bool(head) and b"\0" not in head


def split_text(files: Sequence[Path], fraction: float, by: Split | None = None) -> tuple[Text, Text]:
    """Training text and held-out text.

    Args:
        fraction: Held-out share of the bytes, in (0, 1).
        by: "file" holds out whole files, in the order of a digest of their names, each if it still fits into the share;
            "tail" holds out the end of every file. By default whole files if some fit, else the tails.
    """
    if not 0 < fraction < 1:
        raise TextError(f"the held-out fraction must lie in (0, 1), got {fraction}")
    if by not in (None, "file", "tail"):
        raise TextError(f"split must be 'file' or 'tail', got {by!r}")
    sizes = {path: path.stat().st_size for path in files}
    chosen = files_by_digest(sizes, int(fraction * sum(sizes.values())))
    if by == "file" or (by is None and chosen):
        train = [Piece(path, 0, sizes[path]) for path in files if path not in chosen]
        held_out = [Piece(path, 0, sizes[path]) for path in files if path in chosen]
    else:
        kept = {path: size - int(size * fraction) for path, size in sizes.items()}
        train = [Piece(path, 0, kept[path]) for path in files]
        held_out = [Piece(path, kept[path], size - kept[path]) for path, size in sizes.items()]
    for part, name in ((train, "trained on"), (held_out, "held out")):
        if not any(piece.size for piece in part):
            raise TextError(
                f"nothing is {name} when a share of {fraction} of {len(files)} files is held out; choose another share, "
                "split by 'tail', or give files of their own to hold out"
            )
    return Text(train), Text(held_out)


def files_by_digest(sizes: dict[Path, int], share: int) -> set[Path]:
    """Files in the order of a digest of their names, each taken if it still fits, until nine tenths of `share` are full."""
    folders = [path.parent.parts for path in sizes]
    differing = (i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1)
    depth = next(differing, min(map(len, folders)))

    def digest(path: Path) -> str:
        name = "/".join(path.parts[depth:])
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()

    chosen: set[Path] = set()
    room = share
    for path in sorted(sizes, key=digest):
        if room > share // 10 and 0 < sizes[path] <= room:
            chosen.add(path)
            room -= sizes[path]
    return chosen


class TextWindows:
    """Windows of context + 1 bytes of a text: `context` inputs, and for each the byte that follows.

    A window begins anywhere, drawn by a generator seeded with (seed, step, rank). With `consecutive`, row r of a batch
    begins where row r of the batch before ended, and only the first of them is drawn.
    """

    def __init__(self, text: Text, context: int, *, consecutive: bool = False) -> None:
        self.text, self.context, self.consecutive = text, context, consecutive

    def batch(self, batch_size: int, *, seed: int, step: int, rank: int = 0) -> Tensor:
        """Batch number `step`                                          (batch, context + 1) int64"""
        key = [seed, rank] if self.consecutive else [seed, step, rank]
        starts = np.random.default_rng(key).integers(len(self.text), size=batch_size)
        if self.consecutive:
            starts += step * self.context
        rows = np.stack([self.text.read(int(start), self.context + 1) for start in starts])
        return torch.as_tensor(rows.astype(np.int64))


class ScoredWindow(NamedTuple):
    """Inputs start .. start + length of a text, of whose predictions the first `skip` were scored in the window before."""

    start: int
    length: int
    skip: int


def scored_windows(text: Text, context: int) -> Iterator[ScoredWindow]:
    """Windows, overlapping by half, that score every byte of a text once, and no NUL."""
    for start, piece in zip(text.starts.tolist(), text.pieces, strict=False):
        first = scored = 0
        while scored < piece.size:
            length = min(context, piece.size - first)
            yield ScoredWindow(start + first, length, scored - first)
            scored = first + length
            first += context - context // 2


def some_windows(text: Text, context: int, nbytes: int) -> Iterator[ScoredWindow]:
    """Every so many-th of the scored windows, so that about `nbytes` bytes are scored."""
    return itertools.islice(scored_windows(text, context), 0, None, max(1, round(text.nbytes / nbytes)))


@torch.no_grad()
def bits_per_byte(
    predict: Callable[[Tensor], Tensor],
    text: Text,
    windows: Iterable[ScoredWindow],
    *,
    batch_size: int = 16,
    device: Any = "cpu",
) -> float:
    """Mean of -log2 p over the bytes that the windows score.

    Args:
        predict: From bytes (batch, length) int64 to logits of the byte after each (batch, length, at least 256).
    """
    total, count = 0.0, 0
    ordered = sorted(windows, key=lambda window: window.length)
    for first in range(0, len(ordered), batch_size):
        rows = ordered[first : first + batch_size]
        longest = rows[-1].length
        ids = np.zeros((len(rows), longest + 1), np.int64)
        scored = np.zeros((len(rows), longest), bool)
        for row, (start, length, skip) in enumerate(rows):
            ids[row, : length + 1] = text.read(start, length + 1)
            scored[row, skip:length] = True
        ids_BL, scored_BL = torch.as_tensor(ids, device=device), torch.as_tensor(scored, device=device)
        logits_BLV = predict(ids_BL[:, :-1]).float()
        nats_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
        total += float(nats_BL[scored_BL].double().sum())
        count += int(scored.sum())
    return total / count / float(np.log(2))


class GzipRate(NamedTuple):
    """Bits per byte of `gzip -9`."""

    each: float  # file by file, headers counted
    together: float  # all files as one


def gzip_bits_per_byte(text: Text) -> GzipRate:
    """What gzip -9 makes of the text's files."""
    each, together = 0, zlib.compressobj(9, wbits=31)
    length = 0
    for index in range(len(text.pieces)):
        alone = zlib.compressobj(9, wbits=31)
        for at in range(0, text.pieces[index].size, BLOCK):
            block = text.contents(index, at, BLOCK).data
            each += len(alone.compress(block))
            length += len(together.compress(block))
        each += len(alone.flush())
    length += len(together.flush())
    return GzipRate(8 * each / text.nbytes, 8 * length / text.nbytes)
