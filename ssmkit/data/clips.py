"""Clips with a class each: digits that move, and folders of videos. Items are (clip, label).

A moving digit at start s with a step of v pixels in direction d stands in frame t at

    s + t v d    modulo the height and width

with s uniform on the canvas, whose edges meet. The place in any one frame is then uniform whatever d is: no single frame
tells the direction, two do.

Of a video's n frames, T are taken: "uniform" (Wang et al. 2016, "Temporal segment networks", arXiv:1608.00859) cuts it into T
segments and takes a frame of each,

    floor((t + u_t) n / T)        u_t uniform in [0, 1) in training, 1/2 when held out

and "dense" takes every `stride`-th frame from a start that is drawn in training and in the middle when held out. Draws come
from torch's generator.
"""

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ssmkit.data.images import (
    Digits,
    Sample,
    channel_statistics,
    find_samples,
    import_pillow,
    is_image,
    middle_square,
    read_image,
    require_at_least,
    scaled,
    split_by_class,
    walk,
)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
STATISTICS_CLIPS = 50
# (rows, columns) per step; the first four are those of directions=4
DIRECTIONS = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up left": (-1, -1),
    "up right": (-1, 1),
    "down left": (1, -1),
    "down right": (1, 1),
}

Sampling = Literal["uniform", "dense"]


class ClipData(NamedTuple):
    """Clips to train on and clips held out.

    Attributes:
        train, held_out: Items are a clip, float32 in 0..1 (channels, frames, height, width), and its class as an int.
        classes: Their names.
        mean, std: Per channel, of the training clips.
        flip: Whether a mirrored clip keeps its class.
    """

    train: Dataset[Sample]
    held_out: Dataset[Sample]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool


def moving_digits(
    frames: int = 8,
    size: int = 32,
    directions: int = 4,
    held_out: float = 0.2,
    seed: int = 0,
    clips_per_image: int = 1,
) -> ClipData:
    """Each of scikit-learn's digits moving in each direction; the class is digit and direction, e.g. "3 left".

    Held-out clips are of held-out digits. Clips are drawn when they are asked for, each the same every time.

    Args:
        frames: Frames of a clip.                  size: Their height and width; a digit is half as high and wide.
        directions: 4 (up, down, left, right) or 8 (and diagonally).
        held_out: Share of the images of each digit, in (0, 1).
        seed: Fixes which images those are, starts and steps.
        clips_per_image: Clips per image and direction, with starts and steps of their own.
    Returns:
        Clips (3, frames, size, size), three times the same grey; 10 * directions classes.
    Raises:
        ValueError: An argument is out of range.   ImportError: scikit-learn is missing.
    """
    require_at_least(2, frames=frames)
    require_at_least(8, size=size)
    require_at_least(1, clips_per_image=clips_per_image)
    if directions not in (4, 8):
        raise ValueError(f"directions must be 4 or 8, got {directions}")
    source = Digits.load()
    train, rest = (
        MovingDigits(source, chosen, frames, size, directions, seed, clips_per_image)
        for chosen in split_by_class(source.labels, held_out, seed)
    )
    mean, std = channel_statistics(train, 10 * STATISTICS_CLIPS)
    ways = list(DIRECTIONS)[:directions]
    classes = tuple(f"{digit} {way}" for digit in range(10) for way in ways)
    return ClipData(train, rest, classes, mean, std, flip=False)


class MovingDigits(Dataset[Sample]):
    """Some of the digits, each moving in every direction, `clips_per_image` times."""

    def __init__(
        self,
        source: Digits,
        chosen: NDArray[np.int64],
        frames: int,
        size: int,
        directions: int,
        seed: int,
        clips_per_image: int,
    ) -> None:
        self.source, self.chosen = source, chosen
        self.frames, self.size, self.directions = frames, size, directions
        self.seed, self.clips_per_image = seed, clips_per_image

    def __len__(self) -> int:
        return len(self.chosen) * self.directions * self.clips_per_image

    def __getitem__(self, index: int) -> Sample:
        place, rest = divmod(range(len(self))[index], self.directions * self.clips_per_image)
        way, repeat = divmod(rest, self.clips_per_image)
        image = int(self.chosen[place])
        draw = np.random.default_rng([self.seed, image, way, repeat])
        # A sixteenth to an eighth of the canvas: far from half of it, where both ways along an axis would look alike.
        step = int(draw.integers(max(1, self.size // 16), max(1, self.size // 8) + 1))
        start = draw.integers(self.size, size=2)
        side = self.size // 2
        canvas = torch.zeros(self.size, self.size)
        canvas[:side, :side] = scaled(self.source.images[image], side)
        velocity = step * np.array(list(DIRECTIONS.values())[way])
        clip = shifted(canvas, start + np.arange(self.frames)[:, None] * velocity)
        label = int(self.source.labels[image]) * self.directions + way
        return clip.expand(3, -1, -1, -1), label


def shifted(canvas: Tensor, places: NDArray[np.int64]) -> Tensor:
    """A canvas whose edges meet, its corner moved to each of the places (rows, columns).

    Shapes:
        canvas (height, width), places (frames, 2) -> (frames, height, width)
    """
    rows_TY, cols_TX = (
        (torch.arange(length) - torch.as_tensor(places[:, axis, None])) % length
        for axis, length in enumerate(canvas.shape)
    )
    return canvas[rows_TY[:, :, None], cols_TX[:, None, :]]


def clip_folder(
    path: str | Path,
    frames: int,
    size: int,
    sampling: Sampling = "uniform",
    held_out: float = 0.2,
    seed: int = 0,
    *,
    stride: int = 2,
    load_size: int | None = None,
    flip: bool = True,
) -> ClipData:
    """Clips of a folder that has a sub-folder per class, read when they are asked for.

    Either path/class/... or path/train/class/... and path/val/class/... (or path/test/class/...). A clip is a video
    (*.mp4, *.avi, *.mov, *.mkv, *.webm, *.gif) at any depth below its class, or a folder of images there, its frames in the
    order of the numbers in their names. Hidden files and folders are left out.

    Args:
        frames: Frames of a clip; where a video has fewer, some are repeated.
        size: Their height and width: the middle square, scaled.
        sampling: "uniform", a frame of each of `frames` segments; "dense", every `stride`-th frame from a start.
        held_out: Share of each class, in (0, 1), where the folder has no part of its own to hold out.
        seed: Fixes which clips those are.
        load_size: Height and width of the training clips, where augmentation is to cut `size` out of more; default `size`.
        flip: Whether mirrored clips keep their class.
    Returns:
        RGB clips (3, frames, size, size). A clip that cannot be read raises a ValueError with its name, when it is asked for.
    Raises:
        FileNotFoundError: No such folder, or no clips in it.
        ValueError: Fewer than two classes, a class without clips, or one that is held out but not trained on.
        ImportError: PyAV is missing and there are videos, or Pillow is.
    """
    load_size = size if load_size is None else load_size
    require_at_least(1, frames=frames, size=size, stride=stride, load_size=load_size)
    if sampling not in ("uniform", "dense"):
        raise ValueError(f"sampling must be 'uniform' or 'dense', got {sampling!r}")
    found = find_samples(path, held_out, seed, clips_below, "clips")
    import_pillow("Image")
    if not all(os.path.isdir(name) for name, _ in found.train + found.held_out):
        import_av()
    taken = stride if sampling == "dense" else None
    train = FolderClips(found.train, frames, load_size, taken, drawn=True)
    rest = FolderClips(found.held_out, frames, size, taken, drawn=False)
    mean, std = channel_statistics(FolderClips(found.train, frames, size, taken, drawn=False), STATISTICS_CLIPS)
    return ClipData(train, rest, found.classes, mean, std, flip)


class FolderClips(Dataset[Sample]):
    """Clips and their classes; `stride` None takes frames uniformly, `drawn` in training."""

    def __init__(
        self, samples: Sequence[tuple[str, int]], frames: int, size: int, stride: int | None, *, drawn: bool
    ) -> None:
        self.samples, self.frames, self.size = samples, frames, size
        self.stride, self.drawn = stride, drawn

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        name, label = self.samples[index]
        # As numbers in [0, 1): how many frames there are shows in reading.
        offsets = torch.rand(self.frames, dtype=torch.float64).numpy() if self.drawn else np.full(self.frames, 0.5)
        return read_clip(name, offsets, self.size, self.stride), label


def uniform_frames(count: int, offsets: NDArray[np.float64]) -> list[int]:
    """One frame of each of len(offsets) segments of `count` frames: floor((t + u_t) count / T)."""
    taken = np.floor((np.arange(len(offsets)) + offsets) * count / len(offsets)).astype(int)
    return [min(int(index), count - 1) for index in taken]


def dense_frames(count: int, offsets: NDArray[np.float64], stride: int) -> list[int]:
    """Every stride-th frame from a start that lies at offsets[0] of where it may lie; the last one is repeated."""
    starts = max(1, count - (len(offsets) - 1) * stride)
    start = min(int(offsets[0] * starts), starts - 1)
    return [min(start + t * stride, count - 1) for t in range(len(offsets))]


def read_clip(path: str, offsets: NDArray[np.float64], size: int, stride: int | None) -> Tensor:
    """A video, or a folder of frames, at the offsets in its segments (3, frames, size, size) float32 in 0..1"""

    def taken(count: int) -> list[int]:
        return uniform_frames(count, offsets) if stride is None else dense_frames(count, offsets, stride)

    if os.path.isdir(path):
        names = frame_names(os.listdir(path))
        if not names:
            raise ValueError(f"the clip {path} holds no images any more; start again")
        wanted = taken(len(names))
        images = {index: read_image(os.path.join(path, names[index]), size) for index in set(wanted)}
        return torch.stack([images[index] for index in wanted], dim=1)
    try:
        wanted = taken(count_frames(path))
        images, decoded = decode(path, set(wanted), size)
        if len(images) < len(set(wanted)):
            # The header, or a packet that holds no frame, promised more.
            wanted = taken(decoded)
            images, _ = decode(path, set(wanted), size)
    except Exception as error:  # FFmpeg's readers raise errors of many kinds
        raise ValueError(f"the clip {path} cannot be read ({error}); repair or remove it") from error
    return torch.stack([images[index] for index in wanted], dim=1)


def count_frames(path: str) -> int:
    """Frames of a video: what its header says, else its packets."""
    with import_av().open(path) as video:
        stream = video_stream(video)
        return int(stream.frames) or sum(packet.size > 0 for packet in video.demux(stream))


def decode(path: str, wanted: set[int], size: int) -> tuple[dict[int, Tensor], int]:
    """The wanted frames of a video by their number, as images (3, size, size), and how many were decoded for them."""
    images: dict[int, Tensor] = {}
    decoded = 0
    with import_av().open(path) as video:
        for frame in video.decode(video_stream(video)):
            if decoded in wanted:
                images[decoded] = middle_square(frame.to_image(), size)
            decoded += 1
            if len(images) == len(wanted):
                break
    if decoded == 0:
        raise ValueError("it holds no frame")
    return images, decoded


def video_stream(video: Any) -> Any:
    """The first of the video streams."""
    if not video.streams.video:
        raise ValueError("it holds no video stream")
    return video.streams.video[0]


def import_av() -> Any:
    """PyAV, or an error that says how to get it."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'ssmkit[vision]'") from error


def clips_below(folder: Path) -> list[str]:
    """The videos at any depth, and the folders that hold images."""
    clips = []
    for root, names in walk(folder):
        clips += [os.path.join(root, name) for name in names if is_video(name)]
        if Path(root) != folder and any(map(is_image, names)):
            clips.append(root)
    return clips


def is_video(name: str) -> bool:
    """Whether a file name is that of a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def frame_names(names: Sequence[str]) -> list[str]:
    """The images among the files of a clip, in the order of the numbers in their names."""

    def numbers(name: str) -> list[tuple[int, str]]:
        """Texts and numbers in turn, comparable place by place."""
        return [(int(part), part) if at % 2 else (0, part) for at, part in enumerate(re.split(r"([0-9]+)", name))]

    return sorted((name for name in names if is_image(name) and not name.startswith(".")), key=numbers)
