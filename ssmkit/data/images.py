"""Images with a class each: scikit-learn's digits, and folders of images. Items are (image, label).

A folder's image is scaled so that its shorter side is `size`, and its middle square is kept. One split serves all data sets
with classes: of the n samples of a class,

    held out = round(held_out n), at least 1, at most n - 1

in an order drawn from (seed, class), so that every class keeps its share on both sides.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
HELD_OUT_FOLDERS = ("val", "test")  # the first that is there
STATISTICS_IMAGES = 500
DIGIT_LEVELS = 16  # the largest value in scikit-learn's digits

Sample = tuple[Tensor, int]


class ImageData(NamedTuple):
    """Images to train on and images held out.

    Attributes:
        train, held_out: Items are an image, float32 in 0..1 (channels, height, width), and its class as an int.
        classes: Their names.
        mean, std: Per channel, of the training images.
        flip: Whether a mirrored image keeps its class.
    """

    train: Dataset[Sample]
    held_out: Dataset[Sample]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool


class Digits(NamedTuple):
    """scikit-learn's digits."""

    images: Tensor  # (1797, 8, 8) float32 in 0..1
    labels: NDArray[np.int64]

    @classmethod
    def load(cls) -> "Digits":
        """Read them from the installed package."""
        stored = import_datasets().load_digits()
        return cls(torch.as_tensor(stored.images / DIGIT_LEVELS, dtype=torch.float32), stored.target.astype(np.int64))


def import_datasets() -> Any:
    """sklearn.datasets, or an error that says how to get it."""
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'ssmkit[vision]'") from error


def import_pillow(name: str) -> Any:
    """A module of Pillow, or an error that says how to get it."""
    try:
        return importlib.import_module(f"PIL.{name}")
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'ssmkit[vision]'") from error


def digits(size: int = 32, held_out: float = 0.2, seed: int = 0) -> ImageData:
    """scikit-learn's 1797 handwritten digits, 8 x 8, scaled bilinearly; nothing is downloaded.

    Args:
        size: Height and width of the images.
        held_out: Share of each class, in (0, 1).
        seed: Fixes which images those are.
    Returns:
        Images (3, size, size), three times the same grey.
    Raises:
        ValueError: An argument is out of range.   ImportError: scikit-learn is missing.
    """
    require_at_least(1, size=size)
    source = Digits.load()
    train, rest = split_by_class(source.labels, held_out, seed)
    training = DigitImages(source, train, size)
    mean, std = channel_statistics(training, STATISTICS_IMAGES)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(training, DigitImages(source, rest, size), classes, mean, std, flip=False)


class DigitImages(Dataset[Sample]):
    """Some of the digits, scaled when they are asked for."""

    def __init__(self, source: Digits, chosen: NDArray[np.int64], size: int) -> None:
        self.images, self.labels, self.size = source.images[chosen], source.labels[chosen], size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return scaled(self.images[index], self.size).expand(3, -1, -1), int(self.labels[index])


def scaled(image: Tensor, size: int) -> Tensor:
    """A grey image (height, width), bilinearly scaled to (size, size)."""
    return F.interpolate(image[None, None], (size, size), mode="bilinear", antialias=True)[0, 0]


def image_folder(
    path: str | Path,
    size: int,
    held_out: float = 0.2,
    seed: int = 0,
    *,
    load_size: int | None = None,
    flip: bool = True,
) -> ImageData:
    """Images of a folder that has a sub-folder per class, read when they are asked for.

    Either path/class/... or path/train/class/... and path/val/class/... (or path/test/class/...); *.png, *.jpg, *.jpeg,
    *.bmp, *.webp, *.ppm at any depth below a class. Hidden files and folders are left out.

    Args:
        size: Height and width of the images.
        held_out: Share of each class, in (0, 1), where the folder has no part of its own to hold out.
        seed: Fixes which images those are.
        load_size: Height and width of the training images, where augmentation is to cut `size` out of more; default `size`.
        flip: Whether mirrored images keep their class.
    Returns:
        RGB images (3, size, size). An image that cannot be read raises a ValueError with its name, when it is asked for.
    Raises:
        FileNotFoundError: No such folder, or no images in it.
        ValueError: Fewer than two classes, a class without images, or one that is held out but not trained on.
    """
    load_size = size if load_size is None else load_size
    require_at_least(1, size=size, load_size=load_size)
    import_pillow("Image")
    found = find_samples(path, held_out, seed, images_below, "images")
    training = FolderImages(found.train, load_size)
    mean, std = channel_statistics(training, STATISTICS_IMAGES)
    return ImageData(training, FolderImages(found.held_out, size), found.classes, mean, std, flip)


class FolderImages(Dataset[Sample]):
    """Image files and their classes."""

    def __init__(self, samples: Sequence[tuple[str, int]], size: int) -> None:
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        name, label = self.samples[index]
        return read_image(name, self.size), label


def read_image(path: str, size: int) -> Tensor:
    """The middle square of an image file                           (3, size, size) float32 in 0..1"""
    try:
        with import_pillow("Image").open(path) as image:
            # A JPEG may be decoded at a half, a quarter or an eighth, here of no less than twice the size wanted.
            image.draft(None, (2 * size, 2 * size))
            return middle_square(import_pillow("ImageOps").exif_transpose(image), size)
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(f"the image {path} cannot be read ({error}); repair or remove it") from error


def middle_square(image: Any, size: int) -> Tensor:
    """The middle square of a Pillow image, scaled with antialiasing  (3, size, size) float32 in 0..1"""
    if image.mode.startswith("I"):
        # 16 bits of grey, which convert would cut off at 255
        grey = np.clip(np.asarray(image).astype(np.float32) / 257, 0, 255)
        image = import_pillow("Image").fromarray(grey.round().astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # the way that Pillow asks for; what is transparent keeps its colour
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    bilinear = import_pillow("Image").Resampling.BILINEAR
    square = image.convert("RGB").resize((size, size), bilinear, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 255


def channel_statistics(samples: Dataset[Sample], at_most: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of up to `at_most` samples, evenly spaced."""
    count = len(cast(Any, samples))
    chosen = np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))
    flat = (samples[int(index)][0].double().flatten(1) for index in chosen)
    moments = torch.stack([torch.stack([x.mean(1), x.square().mean(1)]) for x in flat]).mean(0)
    mean, variance = moments[0], moments[1] - moments[0].square()
    return tuple(mean.tolist()), tuple(variance.clamp_min(0).sqrt().tolist())


class Found(NamedTuple):
    """Classes, and for each sample its file or folder and the number of its class."""

    classes: tuple[str, ...]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]


def find_samples(
    path: str | Path, held_out: float, seed: int, samples_below: Callable[[Path], list[str]], what: str
) -> Found:
    """The samples of a folder of classes, or of its train and val (or test); `what` names them in errors."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path}; give one with a sub-folder of {what} per class")
    rest = next((path / name for name in HELD_OUT_FOLDERS if (path / name).is_dir()), None)
    parts = (path / "train").is_dir() and rest is not None
    trained = samples_by_class(path / "train" if parts else path, samples_below, what)
    if len(trained) < 2:
        raise ValueError(
            f"path: {path} has one class only, {next(iter(trained))}; expected a sub-folder per class, or train and val "
            "with a sub-folder per class"
        )
    classes = tuple(trained)
    train = [(sample, label) for label, name in enumerate(classes) for sample in trained[name]]
    if not parts or rest is None:
        chosen = split_by_class(np.array([label for _, label in train]), held_out, seed)
        return Found(classes, *([train[index] for index in part] for part in chosen))
    known = {name: label for label, name in enumerate(classes)}
    others = samples_by_class(rest, samples_below, what)
    unknown = [name for name in others if name not in known]
    if unknown:
        raise ValueError(f"path: {rest / unknown[0]} is a class that {path / 'train'} does not have; move or rename it")
    return Found(classes, train, [(sample, known[name]) for name in others for sample in others[name]])


def samples_by_class(folder: Path, samples_below: Callable[[Path], list[str]], what: str) -> dict[str, list[str]]:
    """The samples of each class, by its name."""
    names = sorted(below.name for below in folder.iterdir() if below.is_dir() and not below.name.startswith("."))
    found = {name: samples_below(folder / name) for name in names}
    if not any(found.values()):
        raise FileNotFoundError(
            f"path: no {what} in sub-folders of {folder}; expected a sub-folder of {what} per class"
        )
    for name, samples in found.items():
        if not samples:
            raise ValueError(f"path: {folder / name} holds no {what}; add some or remove it")
    return found


def images_below(folder: Path) -> list[str]:
    """The image files at any depth."""
    return [os.path.join(root, name) for root, names in walk(folder) for name in names if is_image(name)]


def is_image(name: str) -> bool:
    """Whether a file name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files in the order of their names, links followed, each once, without hidden ones."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root, sorted(name for name in names if not name.startswith("."))


def split_by_class(
    labels: NDArray[np.int64], held_out: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and indices held out, a share `held_out` of each class; a class of one is trained on."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1), got {held_out}")
    chosen = []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        chosen.append(members[: min(len(members) - 1, max(1, round(held_out * len(members))))])
    out = np.sort(np.concatenate(chosen))
    if len(out) == 0:
        raise ValueError("path: every class has a single sample, so that none can be held out; add samples")
    return np.setdiff1d(np.arange(len(labels)), out), out


def require_at_least(least: int, **values: int) -> None:
    """Refuse smaller values of the arguments by these names."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
