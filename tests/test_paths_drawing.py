"""What a drawing of paths shows: the walk as lines, its start, its end, its restarts."""

import sys

import pytest

from ssmkit import ScanPath, paths


def drawn(ax):
    """(x, y) of everything on an axis, by its label, in the order in which it was drawn."""
    found = {}
    for line in ax.lines:
        points = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        found.setdefault(line.get_label(), []).append(points)
    return found


def test_one_path():
    figure = paths.plot(paths.snake(2, 3))
    (ax,) = figure.axes
    assert drawn(ax) == {
        "walk": [[(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]],
        "restarts": [[]],
        "start": [[(0, 0)]],
        "end": [[(0, 1)]],
    }
    assert ax.get_title() == "snake by row"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # row 0 on top


def test_restarts_break_the_line():
    (ax,) = paths.plot(paths.column(2, 3, restarts=True).flip()).axes
    found = drawn(ax)
    assert found["walk"] == [[(2, 1), (2, 0)], [(1, 1), (1, 0)], [(0, 1), (0, 0)]]
    assert found["restarts"] == [[(1, 1), (0, 1)]]
    assert ax.get_title() == "column backwards"


def test_several_paths_and_a_clip():
    figure = paths.plot([paths.row(1, 2), paths.clip(2, 1, 2, "hwt")], titles=["image", "clip"])
    assert [ax.get_title() for ax in figure.axes] == ["image", "clip"]
    # The second frame stands to the right of the first, one column apart.
    assert drawn(figure.axes[1])["walk"] == [[(0, 0), (3, 0), (1, 0), (4, 0)]]


def test_a_path_without_a_shape_takes_one(tmp_path):
    (ax,) = paths.plot(ScanPath([3, 1, 0, 2]), 2, 2).axes
    assert drawn(ax)["walk"] == [[(1, 1), (1, 0), (0, 0), (0, 1)]]
    paths.plot(ScanPath([3, 1, 0, 2]), 2, 2).savefig(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("path", [paths.row(0, 3), paths.row(3, 0), paths.row(1, 1), paths.clip(0, 2, 2)])
def test_nothing_and_next_to_nothing(path, tmp_path):
    figure = paths.plot(path)
    assert sum(len(points) for points in drawn(figure.axes[0])["walk"]) == len(path)
    figure.savefig(tmp_path / "path.png")


REFUSED = {
    "no shape": (lambda: paths.plot(ScanPath([1, 0])), "path has no shape: give height and width, whose product is 2"),
    "half a shape": (lambda: paths.plot(ScanPath([1, 0]), 2), "height and width go together, got height 2 and width"),
    "another size": (lambda: paths.plot(paths.row(2, 2), 3, 2), "a path over 4 tokens cannot be drawn as 3 x 2"),
    "titles": (lambda: paths.plot(paths.row(2, 2), titles=["a", "b"]), "titles must hold one for each of 1 paths, got"),
    "no paths": (lambda: paths.plot([]), "paths must hold at least one path, got none"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'ssmkit\[train\]'"):
        paths.plot(paths.row(2, 2))
