"""Clips with classes: moving digits and what their frames tell, videos and folders of frames, sampling, errors."""

import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ssmkit.data import clip_folder, moving_digits
from ssmkit.data.clips import DIRECTIONS, dense_frames, frame_names, read_clip, shifted, uniform_frames
from ssmkit.data.images import scaled

LEVEL = 8  # frame t of a written clip is grey of 8 t + 20: codecs are off by two or so


def write_video(path, frames, *, shape=(32, 48), codec="mpeg4"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=10)
        stream.height, stream.width = shape
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for t in range(frames):
            pixels = np.full((*shape, 3), LEVEL * t + 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)
    return path


def write_frames(folder, frames, shape=(5, 7)):
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(frames):
        Image.new("RGB", shape, (LEVEL * t + 20,) * 3).save(folder / f"frame{t}.png")
    return folder


def numbers_of(clip):
    """The numbers of the frames of a clip, from their grey."""
    return ((255 * clip.mean((0, 2, 3)) - 20) / LEVEL).round().int().tolist()


def items(data):
    return [data[index] for index in range(len(data))]


@pytest.fixture(scope="module")
def digit_clips():
    return moving_digits(frames=6, size=16)


def test_moving_digits_have_every_digit_in_every_direction(digit_clips):
    assert len(digit_clips.classes) == 40
    assert digit_clips.classes[4 * 3 + 2] == "3 left"
    assert digit_clips.flip is False
    train, held_out = digit_clips.train, digit_clips.held_out
    assert len(train) + len(held_out) == 4 * 1797
    assert not set(train.chosen) & set(held_out.chosen)
    labels = [held_out[index][1] for index in range(len(held_out))]
    counts = np.bincount(labels, minlength=40).reshape(10, 4)
    assert (counts == counts[:, :1]).all() and counts.min() > 30
    clip, label = train[-1]
    assert clip.shape == (3, 6, 16, 16) and clip.dtype == torch.float32 and type(label) is int
    assert float(clip.min()) >= 0 and float(clip.max()) <= 1
    assert torch.equal(clip, train[len(train) - 1][0])
    with pytest.raises(IndexError):
        train[len(train)]


def test_moving_digits_are_fixed_by_the_seed():
    one, same, other = (moving_digits(frames=2, size=8, seed=seed, clips_per_image=2) for seed in (0, 0, 1))
    assert len(one.train) == 2 * 4 * len(one.train.chosen)
    assert all(torch.equal(one.train[i][0], same.train[i][0]) for i in range(20))
    assert any(not torch.equal(one.train[i][0], other.train[i][0]) for i in range(20))
    # two clips of one image and direction differ in their start
    pairs = [(one.train[i], one.train[i + 1]) for i in range(0, 40, 2)]
    assert all(a[1] == b[1] for a, b in pairs)
    assert any(not torch.equal(a[0], b[0]) for a, b in pairs)


def every_place(image, size):
    """The digit at every place of the canvas                        (size * size, size * size)"""
    canvas = torch.zeros(size, size)
    canvas[: size // 2, : size // 2] = scaled(image, size // 2)
    return shifted(canvas, np.array(list(np.ndindex(size, size)))).flatten(1)


def places(frames_TYX, candidates, size):
    """Where the digit stands in each frame: the one candidate that is the same to the last bit."""
    matches = (frames_TYX.flatten(1)[:, None] == candidates).all(-1)
    assert (matches.sum(1) == 1).all()
    return np.stack(np.divmod(matches.int().argmax(1).numpy(), size), axis=1)


@pytest.mark.parametrize("directions", [4, 8])
def test_a_single_frame_does_not_tell_the_direction_and_two_do(directions):
    """Rows and columns are uniform in every frame of every direction; steps between frames are those of the direction."""
    size, frames = 16, 3
    clips = moving_digits(frames, size, directions, clips_per_image=2, held_out=0.1).held_out
    ways = list(DIRECTIONS.values())
    stands = {way: [] for way in range(directions)}
    for index in range(len(clips)):
        clip, label = clips[index]
        way = label % directions
        image, first = divmod(index, 2 * directions)
        if first == 0:
            candidates = every_place(clips.source.images[clips.chosen[image]], size)
        at = places(clip[0], candidates, size)
        steps = np.diff(at, axis=0)
        steps = (steps + size // 2) % size - size // 2
        speed = np.abs(steps).max()
        assert 1 <= speed <= size // 8
        assert (steps == speed * np.array(ways[way])).all()
        stands[way].append(at)
    for way, at in stands.items():
        at = np.stack(at)
        assert len(at) > 300
        for axis in (0, 1):
            for t in range(frames):
                seen = np.bincount(at[:, t, axis], minlength=size)
                expected = len(at) / size
                chi_square = ((seen - expected) ** 2 / expected).sum()
                # 15 degrees of freedom: beyond 44 in one of 10^4 draws, and these are fixed by the seed
                assert chi_square < 44, (way, axis, t)


def test_every_start_of_a_direction_gives_the_same_single_frames():
    """On the torus, frame t over all starts is the same collection of frames for every direction."""
    canvas = torch.zeros(5, 6)
    canvas[:2, :3] = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    starts = [np.array((row, col)) for row in range(5) for col in range(6)]
    collections = []
    for velocity in DIRECTIONS.values():
        clips = [shifted(canvas, start + np.arange(4)[:, None] * np.array(velocity)) for start in starts]
        collections.append([sorted(clip[t].numpy().tobytes() for clip in clips) for t in range(4)])
    assert all(collection == collections[0] for collection in collections)


def test_shifted_rolls():
    canvas = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    moved = shifted(canvas, np.array([[0, 0], [2, -3], [7, 9]]))
    assert torch.equal(moved[0], canvas)
    assert torch.equal(moved[1], canvas.roll((2, -3), (0, 1)))
    assert torch.equal(moved[2], canvas.roll((7, 9), (0, 1)))


def test_uniform_frames():
    middle = np.full(4, 0.5)
    assert uniform_frames(40, middle) == [5, 15, 25, 35]
    assert uniform_frames(4, middle) == [0, 1, 2, 3]
    assert uniform_frames(2, middle) == [0, 0, 1, 1]
    assert uniform_frames(1, middle) == [0] * 4
    ends = np.full(4, 0.999)
    assert uniform_frames(40, np.zeros(4)) == [0, 10, 20, 30]
    assert uniform_frames(40, ends) == [9, 19, 29, 39]


def test_dense_frames():
    assert dense_frames(20, np.full(4, 0.5), 2) == [7, 9, 11, 13]
    assert dense_frames(20, np.zeros(4), 3) == [0, 3, 6, 9]
    assert dense_frames(20, np.full(4, np.nextafter(1.0, 0.0)), 3) == [10, 13, 16, 19]
    assert dense_frames(10, np.full(4, 0.9), 3) == [0, 3, 6, 9]
    assert dense_frames(3, np.full(4, 0.5), 2) == [0, 2, 2, 2]


def test_frame_names_in_the_order_of_their_numbers():
    names = ["f10.png", "f9.jpg", "f1.png", "f010.png", "notes.txt", "._f1.png", "2.png"]
    assert frame_names(names) == ["2.png", "f1.png", "f9.jpg", "f010.png", "f10.png"]


CONTAINERS = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("avi", "mpeg4"),
    ("webm", "libvpx"),
    ("mov", "mpeg4"),
    ("gif", "gif"),
]


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_frames_of_a_video(tmp_path, suffix, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    path = write_video(tmp_path / f"clip.{suffix}", 24, codec=codec)
    clip = read_clip(str(path), np.full(6, 0.5), 8, None)
    assert clip.shape == (3, 6, 8, 8) and clip.dtype == torch.float32
    # gif has eight levels of red and green, four of blue
    if codec == "gif":
        levels = clip.mean((0, 2, 3))
        assert (levels.diff() > 0).sum() >= 3 and (levels.diff() >= 0).all()
    else:
        assert numbers_of(clip) == [2, 6, 10, 14, 18, 22]


def test_a_folder_of_videos_and_of_frames(tmp_path):
    for index in range(2):
        write_video(tmp_path / "a" / f"{index}.mp4", 12)
        write_frames(tmp_path / "b" / f"clip{index}", 12)
    data = clip_folder(tmp_path, frames=3, size=4)
    assert data.classes == ("a", "b") and data.flip is True
    assert [label for _, label in items(data.train)] == [0, 1] == [label for _, label in items(data.held_out)]
    for clip, _ in items(data.held_out):
        assert clip.shape == (3, 3, 4, 4)
        assert numbers_of(clip) == [2, 6, 10]
    seen = [[] for _ in range(3)]
    torch.manual_seed(0)
    for _ in range(40):
        for t, number in enumerate(numbers_of(data.train[1][0])):
            seen[t].append(number)
    assert [set(numbers) for numbers in seen] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}]
    torch.manual_seed(5)
    drawn = data.train[0][0]
    torch.manual_seed(5)
    assert torch.equal(drawn, data.train[0][0])
    grey = sum(sum(numbers) for numbers in ([2, 6, 10], [2, 6, 10])) / 6 * LEVEL + 20
    assert data.mean == pytest.approx([grey / 255] * 3, abs=0.01)


def test_dense_sampling_of_a_folder(tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        write_frames(tmp_path / name / "clip", 12)
    data = clip_folder(tmp_path, frames=3, size=4, sampling="dense", stride=3, load_size=6)
    assert len(data.train) == 2 and len(data.held_out) == 1
    assert numbers_of(data.held_out[0][0]) == [3, 6, 9]
    torch.manual_seed(0)
    starts = set()
    for _ in range(40):
        clip = data.train[0][0]
        assert clip.shape == (3, 3, 6, 6)
        first, *rest = numbers_of(clip)
        assert rest == [first + 3, first + 6]
        starts.add(first)
    assert starts == set(range(6))


def test_a_header_that_promises_too_much(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", 12)
    monkeypatch.setattr("ssmkit.data.clips.count_frames", lambda _: 30)
    assert numbers_of(read_clip(str(path), np.full(3, 0.5), 4, None)) == [2, 6, 10]


def test_worker_processes_give_the_same(tmp_path):
    for name in ("a", "b"):
        for index in range(2):
            write_video(tmp_path / name / f"{index}.mp4", 4)
    data = clip_folder(tmp_path, frames=2, size=4).held_out
    clips, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=2, num_workers=1)))
    assert labels.tolist() == [0, 1]
    assert torch.equal(clips, torch.stack([clip for clip, _ in items(data)]))


def test_errors_name_the_argument_and_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: there is no folder .*nowhere"):
        clip_folder(tmp_path / "nowhere", 4, 4)
    Image.new("RGB", (4, 4)).save((write_frames(tmp_path / "a", 0)) / "loose.png")
    with pytest.raises(FileNotFoundError, match="path: no clips in sub-folders of"):
        clip_folder(tmp_path, 4, 4)
    write_frames(tmp_path / "a" / "clip", 2)
    with pytest.raises(ValueError, match=r"path: .* has one class only, a;"):
        clip_folder(tmp_path, 4, 4)
    for argument in ("frames", "size", "stride", "load_size"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
            clip_folder(tmp_path, **{"frames": 2, "size": 4, argument: 0})
    with pytest.raises(ValueError, match="sampling must be 'uniform' or 'dense', got 'random'"):
        clip_folder(tmp_path, 4, 4, "random")
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        moving_digits(frames=1)
    with pytest.raises(ValueError, match="size must be at least 8, got 7"):
        moving_digits(size=7)
    with pytest.raises(ValueError, match="directions must be 4 or 8, got 6"):
        moving_digits(directions=6)
    with pytest.raises(ValueError, match="clips_per_image must be at least 1, got 0"):
        moving_digits(clips_per_image=0)


@pytest.mark.parametrize("content", ["empty", "no video", "cut off", "sound"])
def test_an_unreadable_clip_is_named_when_it_is_asked_for(tmp_path, content):
    for name in ("a", "b"):
        for index in range(2):
            write_video(tmp_path / name / f"{index}.mp4", 4)
    data = clip_folder(tmp_path, frames=2, size=4).held_out
    broken, _ = data.samples[1]
    with open(broken, "rb") as file:
        whole = file.read()
    if content == "sound":
        with av.open(broken, "w") as sound:
            stream = sound.add_stream("aac", rate=8000, layout="mono")
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 8000
            for packet in [*stream.encode(samples), *stream.encode()]:
                sound.mux(packet)
    else:
        with open(broken, "wb") as file:
            file.write({"empty": b"", "no video": b"some text", "cut off": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match=r"the clip .*\.mp4 cannot be read \(.+\)") as raised:
        data[1]
    assert broken in str(raised.value)
    if content == "sound":
        assert "it holds no video stream" in str(raised.value)
    assert data[0][0].shape == (3, 2, 4, 4)


def test_without_pyav(tmp_path, monkeypatch):
    for name in ("a", "b"):
        for index in range(2):
            write_frames(tmp_path / name / f"clip{index}", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(clip_folder(tmp_path, 2, 4).train) == 2
    (tmp_path / "a" / "video.mp4").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'ssmkit\[vision\]'"):
        clip_folder(tmp_path, 2, 4)
