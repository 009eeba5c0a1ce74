"""The families of paths, each against the picture it draws and the index formulas in print."""

import itertools

import golden_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import law

from ssmkit import ScanPath, paths

SIZES = st.one_of(st.integers(0, 12), st.sampled_from([1, 13]))
FAMILIES = {
    "row": lambda h, w: paths.row(h, w, restarts=True),
    "row from the top right": lambda h, w: paths.row(h, w, corner="top right"),
    "column": lambda h, w: paths.column(h, w, restarts=True),
    "column from the bottom left": lambda h, w: paths.column(h, w, corner="bottom left"),
    "column from the bottom right": lambda h, w: paths.column(h, w, corner="bottom right", restarts=True),
    "snake": lambda h, w: paths.snake(h, w, restarts=True),
    "snake by columns": lambda h, w: paths.snake(h, w, by="column", corner="bottom right"),
    "windows": lambda h, w: paths.windows(h, w, 3, restarts=True),
    "windows by columns": lambda h, w: paths.windows(h, w, (2, 3), between="column", inside="column"),
    "windows of one": lambda h, w: paths.windows(h, w, 1),
    "windows beyond the image": lambda h, w: paths.windows(h, w, 20, inside="column", restarts=True),
    "atrous": lambda h, w: paths.atrous(h, w, 2),
    "atrous by columns": lambda h, w: paths.atrous(h, w, 3, inside="column"),
    "atrous alternating": lambda h, w: paths.atrous(h, w, 2, inside="alternate"),
    "zigzag diagonals": lambda h, w: paths.diagonals(h, w, restarts=True),
    "diagonals mirrored": lambda h, w: paths.diagonals(h, w, mirror=True, zigzag=False),
    "spiral": lambda h, w: paths.spiral(h, w),
    "spiral from within": lambda h, w: paths.spiral(h, w, clockwise=False, outward=True),
    "hilbert": lambda h, w: paths.hilbert(h, w),
    "random": lambda h, w: paths.random(h, w, seed=3),
    "clip": lambda h, w: paths.clip(1, h, w, "wth", restarts="w"),
}


def cells(path):
    """Row and column (and frame first, for a clip) of each position."""
    return torch.stack(torch.unravel_index(path.tokens(), path.shape), dim=1).tolist() if len(path) else []


def segments(path):
    """The cells between restarts."""
    visited = cells(path)
    ends = [0, *path.restart_positions().tolist(), len(visited)]
    return [visited[start:end] for start, end in itertools.pairwise(ends)]


def steps(path):
    """How far each step goes along each axis."""
    return [[abs(b - a) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(cells(path))]


def lines(height, width, *, by="row"):
    """The rows or columns of an image, as lists of cells."""
    rows = [[[i, j] for j in range(width)] for i in range(height)]
    return rows if by == "row" else [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
@given(height=SIZES, width=SIZES)
@law
def test_every_path_is_a_permutation_that_its_inverse_undoes(make, height, width):
    path = make(height, width)
    assert sorted(path.tokens().tolist()) == list(range(height * width))
    assert path.tokens()[path.inverse()].tolist() == list(range(height * width))
    assert path.shape[-2:] == (height, width)
    table = path.order(torch.device("cpu"))
    table = torch.arange(height * width) if table is None else table
    assert path.tokens().tolist() == (table.flip(0) if path.reversed else table).tolist()


# Lines


@given(height=SIZES, width=SIZES)
@law
def test_rows_and_columns(height, width):
    rows, columns = lines(height, width), lines(height, width, by="column")
    assert [line for line in segments(paths.row(height, width, restarts=True)) if line] == [r for r in rows if r]
    assert [line for line in segments(paths.column(height, width, restarts=True)) if line] == [c for c in columns if c]
    formula = [(t % height) * width + t // height for t in range(height * width)]
    assert paths.column(height, width).tokens().tolist() == formula
    right = [cell for column in columns[::-1] for cell in column]
    assert cells(paths.column(height, width, corner="top right")) == right
    assert cells(paths.row(height, width, corner="bottom left")) == [cell for row in rows[::-1] for cell in row]
    backwards = paths.row(height, width, corner="bottom right", restarts=True)
    assert [line for line in segments(backwards) if line] == [row[::-1] for row in rows[::-1] if row]


@given(height=st.integers(1, 9), width=st.integers(1, 9))
@law
def test_a_snake_goes_line_by_line_from_neighbour_to_neighbour(height, width):
    corners = {
        "top left": [0, 0],
        "top right": [0, width - 1],
        "bottom left": [height - 1, 0],
        "bottom right": [height - 1, width - 1],
    }
    for (corner, start), by in itertools.product(corners.items(), ("row", "column")):
        path = paths.snake(height, width, by=by, corner=corner, restarts=True)
        assert cells(path)[0] == start
        assert all(sum(step) == 1 for step in steps(path))
        expected = lines(height, width, by=by)
        expected = expected if expected[0][0] == start or start in expected[0] else expected[::-1]
        assert [sorted(line) for line in segments(path)] == expected
        assert paths.moves(path)[0] == 0


def test_the_eight_zigzags_of_zigma_on_three_by_three():
    expected = [
        [0, 1, 2, 5, 4, 3, 6, 7, 8], [0, 3, 6, 7, 4, 1, 2, 5, 8],
        [2, 1, 0, 3, 4, 5, 8, 7, 6], [2, 5, 8, 7, 4, 1, 0, 3, 6],
        [6, 7, 8, 5, 4, 3, 0, 1, 2], [6, 3, 0, 1, 4, 7, 8, 5, 2],
        [8, 7, 6, 3, 4, 5, 2, 1, 0], [8, 5, 2, 1, 4, 7, 6, 3, 0],
    ]  # fmt: skip
    assert [path.tokens().tolist() for path in paths.zigzag8(3, 3)] == expected


@given(height=st.integers(1, 7), width=st.integers(1, 7))
@law
def test_the_sets_of_four(height, width):
    rows, columns, rows_back, columns_back = (path.tokens() for path in paths.cross(height, width))
    image = torch.arange(height * width).view(height, width)
    assert rows.equal(image.flatten()) and rows_back.equal(image.flatten().flip(0))
    assert columns.equal(image.T.flatten()) and columns_back.equal(image.T.flatten().flip(0))
    o1, o2, o3, o4 = paths.continuous(height, width)
    assert o2.tokens().equal(o1.tokens().flip(0)) and o4.tokens().equal(o3.tokens().flip(0))
    # The last row starts at the right if the height is odd, at the left if it is even; columns alike.
    assert cells(o2)[0] == [height - 1, width - 1 if height % 2 else 0]
    assert cells(o4)[0] == [height - 1 if width % 2 else 0, width - 1]


def test_the_paths_of_vmamba_in_print():
    """What the official cross_scan hands to the scan, for two of its kinds."""
    turned = (
        paths.row(5, 7),
        paths.column(5, 7, corner="top right"),
        paths.row(5, 7, corner="bottom right"),
        paths.column(5, 7, corner="bottom left"),
    )
    for name, routes in (("cross2d", paths.cross(5, 7)), ("rot90", turned)):
        case = golden_cases.load(f"vmamba_cross_scan_{name}")
        tokens = case.inputs["x"].flatten(2)
        for k, path in enumerate(routes):
            assert tokens[..., path.tokens()].equal(case.outputs["cross_scan"][:, k])


def test_the_moves_of_a_snake():
    right, left, up, down = (paths.MOVES.index(word) for word in ("right", "left", "up", "down"))
    assert (right, left, up, down) == (1, 2, 3, 4)  # PlainMamba's table
    assert paths.moves(paths.snake(3, 3)).tolist() == [0, right, right, down, left, left, down, right, right]
    o4 = paths.continuous(3, 2)[3]
    assert paths.moves(o4).tolist() == [0, down, down, left, up, up]
    assert paths.moves(paths.row(0, 3)).tolist() == [] and paths.moves(paths.row(1, 1)).tolist() == [0]
    with pytest.raises(ValueError, match=r"from position 2 to 3 it goes from \(0, 2\) to \(1, 0\)"):
        paths.moves(paths.row(2, 3))
    with pytest.raises(ValueError, match="path must have a shape"):
        paths.moves(ScanPath([0, 1]))


# Windows and sub-grids


@given(data=st.data())
@law
def test_windows_come_one_after_the_other(data):
    height, width = data.draw(SIZES), data.draw(SIZES)
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    between, inside = (data.draw(st.sampled_from(["row", "column"])) for _ in range(2))
    expected = []
    corners = [(i, j) for i in range(0, height, rows) for j in range(0, width, columns)]
    for top, left in corners if between == "row" else sorted(corners, key=lambda corner: corner[::-1]):
        window = [[i, j] for i in range(top, min(top + rows, height)) for j in range(left, min(left + columns, width))]
        expected.append(window if inside == "row" else sorted(window, key=lambda cell: cell[::-1]))
    path = paths.windows(height, width, (rows, columns), between=between, inside=inside, restarts=True)
    assert segments(path) == (expected or [[]])


@given(height=SIZES, width=SIZES, window=st.integers(1, 5))
@law
def test_windows_follow_the_formula_of_local_mamba(height, width, window):
    wide = -(-width // window)  # windows side by side
    rank = {
        i * width + j: (wide * (i // window) + j // window) * window**2 + i % window * window + j % window
        for i in range(height)
        for j in range(width)
    }
    assert paths.windows(height, width, window).tokens().tolist() == sorted(rank, key=rank.get)
    # On the padded image the ranks are the positions themselves, pads included.
    image = paths.padded(height, width, window)
    places = paths.windows(image.height, image.width, window).inverse().view(image.height, image.width)
    assert places[:height, :width].flatten().tolist() == list(rank.values())
    assert image.real.view(image.height, image.width)[:height, :width].all() and image.real.sum() == height * width


@given(height=SIZES, width=SIZES, step=st.integers(1, 4), inside=st.sampled_from(["row", "column", "alternate"]))
@law
def test_sub_grids_come_one_after_the_other(height, width, step, inside):
    image = torch.arange(height * width).view(height, width)
    expected = []
    for left, top in itertools.product(range(step), repeat=2):
        grid = image[top::step, left::step]
        by_column = inside == "column" or (inside == "alternate" and top % 2)
        expected.append((grid.T if by_column else grid).flatten())
    path = paths.atrous(height, width, step, inside=inside)
    assert path.tokens().equal(torch.cat(expected))
    ends = torch.tensor([len(grid) for grid in expected if len(grid)]).cumsum(0)[:-1]
    assert path.restart_positions().tolist() == ends.tolist()
    assert not len(paths.atrous(height, width, step, inside=inside, restarts=False).restart_positions())


def test_the_skips_of_efficient_vmamba_on_four_by_four():
    path = paths.atrous(4, 4, 2, inside="alternate")
    expected = [[0, 2, 8, 10], [4, 12, 6, 14], [1, 3, 9, 11], [5, 13, 7, 15]]
    assert path.tokens().view(4, 4).tolist() == expected
    assert path.restart_positions().tolist() == [4, 8, 12]


# Diagonals and spirals


@given(height=st.integers(1, 9), width=st.integers(1, 9), mirror=st.booleans(), zigzag=st.booleans())
@law
def test_diagonals(height, width, mirror, zigzag):
    path = paths.diagonals(height, width, mirror=mirror, zigzag=zigzag, restarts=True)
    expected = []
    for k in range(height + width - 1):
        upwards = [[i, k - i] for i in range(height - 1, -1, -1) if 0 <= k - i < width]
        expected.append(upwards[::-1] if zigzag and k % 2 else upwards)
    assert segments(path) == [[[i, width - 1 - j if mirror else j] for i, j in line] for line in expected]
    if zigzag:
        assert all(max(step) == 1 for step in steps(path))


@given(height=st.integers(1, 9), width=st.integers(1, 9))
@law
def test_a_spiral_walks_until_it_must_turn_right(height, width):
    free = {(i, j) for i in range(height) for j in range(width)}
    (i, j), (di, dj) = (0, 0), (0, 1)
    expected = []
    while True:
        expected.append([i, j])
        free.discard((i, j))
        if (i + di, j + dj) not in free:
            di, dj = dj, -di
        if (i + di, j + dj) not in free:
            break
        i, j = i + di, j + dj
    assert cells(paths.spiral(height, width)) == expected
    assert cells(paths.spiral(height, width, clockwise=False)) == [[height - 1 - i, j] for i, j in expected]
    assert cells(paths.spiral(height, width, outward=True)) == expected[::-1]
    rings = [min(i, j, height - 1 - i, width - 1 - j) for i, j in cells(paths.spiral(height, width))]
    assert rings == sorted(rings)


def test_the_routes_of_mhs_vm_on_three_by_four():
    assert paths.diagonals(3, 4).tokens().tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]
    assert paths.spiral(3, 4).tokens().tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]


# Curves


@given(height=st.integers(1, 40), width=st.integers(1, 40))
@law
def test_the_hilbert_curve_goes_from_neighbour_to_neighbour(height, width):
    path = paths.hilbert(height, width)
    long, short = max(height, width), min(height, width)
    far = [step for step in steps(path) if sum(step) != 1]
    start, end = cells(path)[0], cells(path)[-1]
    corner = [0, width - 1] if width >= height else [height - 1, 0]
    assert start == [0, 0]
    if long % 2 == 1 and short % 2 == 0:  # from corner to corner there is no way without a diagonal step
        assert far == ([[1, 1]] if end == corner else [])
    else:
        assert not far
        assert end == corner or long == 1


def test_the_hilbert_curve_of_a_power_of_two():
    """Each quarter is walked in one piece, on every level; the usual definition, curve of curves."""
    for size in (2, 4, 8, 16, 32):
        visited = cells(paths.hilbert(size, size))
        quarter = size
        while quarter > 1:
            quarter //= 2
            blocks = [(i // quarter, j // quarter) for i, j in visited]
            assert len([key for key, _ in itertools.groupby(blocks)]) == (size // quarter) ** 2
    assert paths.hilbert(4, 4).tokens().tolist() == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_eight_positions_of_the_hilbert_curve(size):
    eight = paths.hilbert8(size)
    for path in eight:
        assert all(sum(step) == 1 for step in steps(path))
    for curve, quirk in zip(eight, paths.hilbert8(size, ranks=True), strict=True):
        assert quirk.tokens().equal(curve.inverse())
    if size > 1:
        starts = [tuple(cells(path)[0]) for path in eight]
        corners = {(i, j) for i in (0, size - 1) for j in (0, size - 1)}
        assert set(starts) == corners
        assert len({tuple(path.tokens().tolist()) for path in eight}) == 8
    # The second is the first transposed, and so on in pairs.
    for first, second in zip(eight[::2], eight[1::2], strict=True):
        assert cells(second) == [cell[::-1] for cell in cells(first)]


def test_random_paths_repeat_by_their_seed():
    paths.random(6, 7, seed=1)
    assert paths.random(6, 7, seed=1) == ScanPath(paths.random(6, 7, seed=1).tokens())
    assert paths.random(6, 7, seed=1) != paths.random(6, 7, seed=2)


# Clips and routes


@given(data=st.data())
@law
def test_every_order_of_a_clip(data):
    shape = [data.draw(st.integers(0, 5)) for _ in range(3)]
    order = "".join(data.draw(st.permutations("thw")))
    count = data.draw(st.integers(0, 2))
    axes = ["thw".index(axis) for axis in order]
    clip = torch.arange(torch.Size(shape).numel()).view(shape).permute(axes)
    path = paths.clip(*shape, order, restarts=order[:count])
    assert path.tokens().equal(clip.flatten())
    if path.length:
        parts = list(path.tokens().tensor_split(path.restart_positions()))
        assert len(parts) == clip.shape[:count].numel()
        for part, expected in zip(parts, clip.reshape(len(parts), -1), strict=True):
            assert part.equal(expected)
    if path.length:
        snake = paths.clip(*shape, order, snake=True, restarts=order[:count])
        assert sorted(snake.tokens().tolist()) == list(range(snake.length))
        assert all(sum(step) == 1 for step in steps(snake))
        slowest = [cell[axes[0]] for cell in cells(snake)]
        assert slowest == sorted(slowest)
        assert snake.restart_positions().equal(path.restart_positions())


def test_temporal_first_is_every_frame_of_a_place_then_the_next_place():
    frames, places = 4, 6
    expected = [frame * places + place for place in range(places) for frame in range(frames)]
    assert paths.clip(frames, 2, 3, "hwt").tokens().tolist() == expected


@given(data=st.data())
@law
def test_concatenated_routes(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
    parts = [paths.column(*size, restarts=data.draw(st.booleans())) for size in sizes]
    parts = [part.flip() if data.draw(st.booleans()) else part for part in parts]
    restarts = data.draw(st.booleans())
    route = paths.concatenate(*parts, restarts=restarts)
    expected, starts, offset = [], set(), 0
    for part in parts:
        if restarts and part.length and offset:
            starts.add(offset)
        starts |= {offset + position for position in part.restart_positions().tolist()}
        expected += [offset + token for token in part.tokens().tolist()]
        offset += part.length
    assert route.tokens().tolist() == expected
    assert route.restart_positions().tolist() == sorted(starts)


REFUSED = {
    "negative": (lambda: paths.row(-1, 3), "height must be an integer of at least 0, got -1"),
    "fraction": (lambda: paths.column(3, 2.0), "width must be an integer of at least 0, got 2.0"),
    "fraction of what is known": (lambda: (paths.hilbert(6, 6), paths.hilbert(6, 6.0)), "width must be an integer"),
    "truth value": (lambda: paths.spiral(True, 2), "height must be an integer of at least 0, got True"),
    "frames": (lambda: paths.clip(None, 2, 2), "frames must be an integer of at least 0, got None"),
    "no window": (lambda: paths.windows(4, 4, 0), "window must be an integer of at least 1, got 0"),
    "window of three": (lambda: paths.windows(4, 4, (1, 2, 3)), r"window must be a size or a pair \(rows, columns\)"),
    "no step": (lambda: paths.atrous(4, 4, 0), "step must be an integer of at least 1, got 0"),
    "by": (lambda: paths.snake(4, 4, by="rows"), "by must be one of 'row', 'column', got 'rows'"),
    "corner": (lambda: paths.snake(4, 4, corner="left"), "corner must be one of 'top left', .* got 'left'"),
    "inside": (lambda: paths.windows(4, 4, 2, inside="w"), "inside must be one of 'row', 'column', got 'w'"),
    "alternate": (lambda: paths.atrous(4, 4, 2, inside="w"), "inside must be one of 'row', 'column', 'alternate'"),
    "order": (lambda: paths.clip(2, 2, 2, "tw"), "order must be one of 'thw', .* got 'tw'"),
    "axis": (lambda: paths.clip(2, 2, 2, "hwt", restarts="t"), "restarts must be one of '', 'h', 'hw', got 't'"),
    "no routes": (lambda: paths.concatenate(), "paths must hold at least one path, got none"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
