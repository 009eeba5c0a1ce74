"""ssmkit train vision, train video and classify: the job from files to classes, in miniature; mistakes without tracebacks."""

import json
import shlex

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("PIL")

from PIL import Image

from ssmkit.cli import main

TINY = shlex.split(
    "--size 8 --steps 3 --batch-size 4 --valid-every 2 --augment none --accelerator cpu --devices 1 "
    "--set depth=1 embed_dim=16 patch_size=4"
)


def run(capsys, *argv):
    status = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def picture(kind, index):
    """Bright rows or columns."""
    pixels = np.random.default_rng(index).integers(0, 60, (9, 11, 3), dtype=np.uint8)
    pixels[3:6] += 150
    return Image.fromarray(pixels if kind == "rows" else pixels.swapaxes(0, 1).copy())


def test_the_job_from_pictures_to_classes(tmp_path, capsys):
    for kind in ("rows", "columns"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for index in range(6):
            picture(kind, index).save(tmp_path / "data" / kind / f"{index}.png")
    train = ["train", "vision", "--data", tmp_path / "data", "--model", "vim_tiny", "--held-out", "0.34", *TINY]
    status, out, _ = run(capsys, *train, "--out", tmp_path / "run")
    assert status == 0
    assert "8 samples of 2 classes, 4 held out" in out
    assert "step 2: held out: " in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"held out: {100 * results['accuracy']:.2f} % of 4 right" in out
    status, _, err = run(capsys, *train, "--out", tmp_path / "run")
    assert status == 2
    assert "already holds a run" in err
    assert run(capsys, *train, "--out", tmp_path / "run", "--resume")[0] == 0

    file = tmp_path / "data" / "rows" / "0.png"
    status, out, _ = run(capsys, "classify", tmp_path / "run", file, "--top", "2")
    assert status == 0
    name, _, told = out.strip().partition(": ")
    assert name == str(file)
    shares = dict(part.split() for part in told.split(", "))
    assert set(shares) == {"rows", "columns"}
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=2e-3)


def test_the_job_from_frames_to_classes(tmp_path, capsys):
    for kind in ("rows", "columns"):
        for clip in range(3):
            folder = tmp_path / "data" / kind / f"clip{clip}"
            folder.mkdir(parents=True)
            for frame in range(3):
                picture(kind, 10 * clip + frame).save(folder / f"{frame}.png")
    train = ["train", "video", "--data", tmp_path / "data", "--model", "videomamba_tiny", "--frames", "2", *TINY]
    views = ["--augment", "full"]  # of frames read larger than they are shown
    status, out, err = run(capsys, *train, *views, "--held-out", "0.34", "--out", tmp_path / "run")
    assert status == 0, err
    assert "4 samples of 2 classes, 2 held out" in out
    status, out, _ = run(capsys, "classify", tmp_path / "run", tmp_path / "data" / "rows" / "clip0")
    assert status == 0
    assert out.strip().split(": ")[1].split()[0] in ("rows", "columns")


MISTAKES = {
    "no such folder": (["vision", "--data", "nowhere", "--model", "vim_tiny"], "nowhere"),
    "no such model": (["vision", "--data", "digits", "--model", "vit"], "unknown model 'vit'"),
    "no such option": (["vision", "--data", "digits", "--model", "vim_tiny", "--set", "heads=3"], "heads"),
    "clips for an image model": (["video", "--data", "moving-digits", "--model", "vim_tiny"], "vim_tiny"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_a_message(tmp_path, capsys, argv, message):
    if "digits" in argv[2]:
        pytest.importorskip("sklearn")
    small = ["--size", "8", "--steps", "1", "--augment", "none"]
    status, _, err = run(capsys, "train", *argv, *small, "--out", tmp_path / "run")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
