"""Images with classes: the digits, folders, their splits, statistics and errors."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkit.data import digits, image_folder
from ssmkit.data.images import split_by_class


def write_images(folder, classes, per_class=5, shape=(6, 9), suffix="png"):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.{suffix}")
    return folder


def items(data):
    return [data[index] for index in range(len(data))]


def test_digits_are_all_of_scikit_learns_digits():
    from sklearn.datasets import load_digits

    data = digits(size=8, held_out=0.25, seed=3)
    assert data.classes == tuple("0123456789")
    assert data.flip is False
    stored = load_digits()
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(stored.images, stored.target, strict=True))
    found = []
    for image, label in items(data.train) + items(data.held_out):
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and type(label) is int
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        found.append(((image[0] * 16).double().numpy().tobytes(), label))
    assert sorted(found) == expected


@pytest.mark.parametrize("size", [4, 32])
def test_digits_of_another_size(size):
    data = digits(size)
    image, _ = data.train[0]
    assert image.shape == (3, size, size)
    assert float(image.min()) >= 0 and float(image.max()) <= 1
    # scaling keeps the mean but for the edges
    assert float(image.mean()) == pytest.approx(float(digits(8).train[0][0].mean()), rel=0.1)


def test_a_split_keeps_the_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    train, held_out = split_by_class(labels, 0.2, seed=0)
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 2, 1, 0]
    again = split_by_class(labels, 0.2, seed=0)
    assert np.array_equal(train, again[0]) and np.array_equal(held_out, again[1])
    assert not np.array_equal(held_out, split_by_class(labels, 0.2, seed=1)[1])


def test_a_folder_of_classes(tmp_path):
    write_images(tmp_path / "set", ["cat", "dog"], per_class=5)
    write_images(tmp_path / "set", ["dog/deeper"], per_class=5, suffix="JPG")
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / "cat" / "._0.png").write_bytes(b"left by a file manager")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    data = image_folder(tmp_path / "set", size=4)
    assert data.classes == ("cat", "dog")
    assert data.flip is True
    assert [label for _, label in items(data.train)] == [0] * 4 + [1] * 8
    assert [label for _, label in items(data.held_out)] == [0] + [1] * 2
    for image, _ in items(data.train) + items(data.held_out):
        assert image.shape == (3, 4, 4) and image.dtype == torch.float32 and image.is_contiguous()
    files = [name for part in (data.train, data.held_out) for name, _ in part.samples]
    assert len(set(files)) == 15
    larger = image_folder(tmp_path / "set", size=4, load_size=5, flip=False)
    assert larger.train[0][0].shape == (3, 5, 5) and larger.held_out[0][0].shape == (3, 4, 4)
    assert larger.flip is False


@pytest.mark.parametrize("rest", ["val", "test"])
def test_a_folder_with_its_own_held_out_part(tmp_path, rest):
    write_images(tmp_path / "train", ["a", "b", "c"], per_class=2)
    write_images(tmp_path / rest, ["c", "b"], per_class=3)
    data = image_folder(tmp_path, size=4)
    assert data.classes == ("a", "b", "c")
    assert [label for _, label in items(data.train)] == [0, 0, 1, 1, 2, 2]
    assert [label for _, label in items(data.held_out)] == [1] * 3 + [2] * 3


@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (6, 6), (7, 10)])
def test_the_middle_square_is_kept(tmp_path, height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    side = min(height, width)
    image, _ = image_folder(tmp_path, size=side).train[0]
    actual = (255 * image).permute(1, 2, 0).numpy()
    top, left = (height - side) // 2, (width - side) // 2
    middle = pixels[top : top + side, left : left + side].astype(float)
    if (width - side) % 2:
        # the square lies half a pixel further
        middle = (middle + pixels[top : top + side, left + 1 : left + 1 + side]) / 2
    assert np.abs(actual - middle).max() <= (1 if (width - side) % 2 else 1e-3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.linspace(0, 255, 36).reshape(6, 6).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(grey).convert(mode)
        image.info["transparency"] = bytes(range(256))
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            image.save(tmp_path / name / f"{index}.{'jpg' if mode == 'CMYK' else 'png'}", quality=100)
    read, _ = image_folder(tmp_path, size=6).train[0]
    assert read.shape == (3, 6, 6)
    if mode == "1":
        assert set(read.unique().tolist()) == {0.0, 1.0}
    else:
        tolerance = 0.1 if mode == "CMYK" else 1e-6
        assert (read - torch.as_tensor(grey / 255)).abs().max() <= tolerance


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    write_images(tmp_path, ["a", "b"], per_class=10, shape=(5, 5))
    data = image_folder(tmp_path, size=5)
    pixels = torch.stack([image for image, _ in items(data.train)]).double()
    torch.testing.assert_close(torch.tensor(data.mean, dtype=torch.float64), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(data.std, dtype=torch.float64), pixels.std((0, 2, 3), correction=0))


def test_worker_processes_give_the_same(tmp_path):
    write_images(tmp_path, ["a", "b"], per_class=3)
    data = image_folder(tmp_path, size=4).train
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    images, labels = next(iter(loader))
    assert labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(images, torch.stack([image for image, _ in items(data)]))


def test_errors_name_the_argument_and_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: there is no folder .*nowhere"):
        image_folder(tmp_path / "nowhere", size=4)
    with pytest.raises(FileNotFoundError, match="path: no images in sub-folders of"):
        image_folder(tmp_path, size=4)
    write_images(tmp_path, ["a"])
    with pytest.raises(ValueError, match=r"path: .* has one class only, a;"):
        image_folder(tmp_path, size=4)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"path: .*b holds no images"):
        image_folder(tmp_path, size=4)
    write_images(tmp_path, ["b"])
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\), got"):
            image_folder(tmp_path, size=4, held_out=share)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        image_folder(tmp_path, size=0)
    with pytest.raises(ValueError, match="size must be at least 1, got -1"):
        digits(size=-1)
    for part in ("train", "val"):
        write_images(tmp_path / "parts" / part, ["a", "b"], per_class=1)
    with pytest.raises(ValueError, match="single sample"):
        image_folder(tmp_path / "parts" / "train", size=4)
    write_images(tmp_path / "parts" / "val", ["zebra"])
    with pytest.raises(ValueError, match=r"path: .*val.zebra is a class that .*train does not have"):
        image_folder(tmp_path / "parts", size=4)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_an_unreadable_image_is_named_when_it_is_asked_for(tmp_path, content):
    write_images(tmp_path, ["a", "b"], per_class=4, shape=(40, 40))
    data = image_folder(tmp_path, size=4).train
    broken = tmp_path / "b" / "0.png"
    names = [name for name, _ in data.samples]
    if str(broken) not in names:
        broken = tmp_path / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:500] if content == "truncated" else content)
    index = names.index(str(broken))
    with pytest.raises(ValueError, match=rf"the image .*b.{broken.name} cannot be read"):
        data[index]
    assert data[0][0].shape == (3, 4, 4)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ssmkit\[vision\]'"):
        digits()
