"""ScanPath: what it holds, what it refuses, and what the ops make of it, in eager code, compiled and exported."""

import copy
import pickle
import time
from threading import Thread
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ssmkit import ScanPath, paths
from ssmkit.ops import causal_conv1d, selective_scan
from ssmkit.paths import kept, scan_path
from ssmkit.paths.scan_path import Strides
from ssmkit.testing import available, device_of, selective_scan_inputs

CPU = torch.device("cpu")
PER_TOKEN = ("x", "dt", "B", "C", "z")


def walk_of(path):
    """The tokens as the kernels see them: the table or the line, backwards where the path says so."""
    order = path.order(CPU)
    order = torch.arange(path.length, dtype=torch.int32) if order is None else order
    return (order.flip(0) if path.reversed else order).long()


@given(data=st.data())
@law
def test_what_a_path_says_of_itself_agrees(data):
    length = data.draw(st.integers(0, 30))
    order = data.draw(st.permutations(range(length)))
    restarts = data.draw(st.sets(st.integers(0, length - 1), max_size=4)) if length else set()
    path = ScanPath(order, restarts=sorted(restarts))
    for each in (path, path.flip()):
        assert each.tokens().tolist() == walk_of(each).tolist()
        assert [order.index(token) for token in range(length)] == path.inverse().tolist()
        assert each.tokens()[each.inverse()].tolist() == list(range(length))
        flags = each.restarts(CPU)
        flagged = [] if flags is None else each.inverse()[flags].sort().values.tolist()
        assert each.restart_positions().tolist() == flagged
        assert len(each) == each.length == length
    assert path.restart_positions().tolist() == sorted(restarts)
    assert path.tokens().tolist() == list(order)
    assert path.flip().tokens().tolist() == list(order)[::-1]


@given(data=st.data())
@law
def test_a_flip_keeps_the_segments(data):
    length = data.draw(st.integers(1, 20))
    order = torch.tensor(data.draw(st.permutations(range(length))))
    restarts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []

    def segments(path):
        return [part.tolist() for part in path.tokens().tensor_split(path.restart_positions())]

    path = ScanPath(order, restarts=restarts)
    assert segments(path.flip()) == [part[::-1] for part in segments(path)][::-1]
    assert path.flip().flip() is path
    assert ScanPath(order, restarts=[0, *restarts]).flip().restart_positions()[0] == 0


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_lines_keep_no_table(length):
    forwards = [ScanPath.identity(length), ScanPath(range(length)), paths.row(1, length), paths.row(length, 1)]
    forwards += [paths.column(length, 1), paths.column(1, length), paths.snake(1, length), paths.hilbert(1, length)]
    forwards += [paths.windows(length, 1, 3), paths.clip(1, length, 1, "wht"), ScanPath.reverse(length).flip()]
    for path in forwards:
        assert path.order(CPU) is None and not path.reversed
    for path in [ScanPath.reverse(length), *(path.flip() for path in forwards)]:
        assert path.order(CPU) is None
        assert path.tokens().tolist() == list(range(length))[::-1]
    assert ScanPath(list(range(length))[::-1]).order(CPU) is None


AFFINE = {
    "row": lambda: paths.row(401, 301),
    "row from the right": lambda: paths.row(401, 301, corner="top right"),
    "column": lambda: paths.column(401, 301),
    "windows": lambda: paths.windows(400, 300, (4, 3)),
    "atrous": lambda: paths.atrous(400, 300, 2),
    "clip": lambda: paths.clip(7, 101, 211, "wth"),
    "flipped clip": lambda: paths.clip(7, 101, 211, "wth").flip(),
}


@pytest.mark.parametrize("make", AFFINE.values(), ids=AFFINE)
def test_affine_walks_hold_no_table_until_asked(make):
    path = make()
    assert path.strides is not None
    held = [value for value in vars(path).values() if isinstance(value, torch.Tensor) or hasattr(value, "nbytes")]
    assert all(value.nbytes < path.length for value in held)
    assert len(pickle.dumps(path)) < path.length  # whatever else hangs on it
    sizes, strides, start = path.strides
    digits = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(path.length, len(sizes))
    expected = start + (digits * torch.tensor(strides)).sum(1)
    assert walk_of(path).equal(expected.flip(0) if path.reversed else expected)


def test_tables_are_made_once_and_shared_by_equal_orders():
    path = paths.column(5, 6)
    assert path.order(CPU) is path.order(CPU)
    assert path.flip().order(CPU) is path.order(CPU)
    assert ScanPath.of(Strides((6, 5), (1, 6))).order(CPU) is path.order(CPU)
    one, other = ScanPath([2, 0, 1], restarts=[1]), ScanPath(torch.tensor([2, 0, 1]), restarts=[1])
    assert one.order(CPU) is other.order(CPU)
    assert one.restarts(CPU) is other.restarts(CPU)
    assert one.order(CPU).dtype == torch.int32


def test_a_table_made_under_inference_mode_serves_training():
    with torch.inference_mode():
        path = ScanPath([3, 1, 0, 2], restarts=[2])
        tables = path.order(CPU), path.restarts(CPU)
    assert not any(table.is_inference() for table in tables)


def test_the_constructors_keep_what_they_made():
    assert paths.snake(5, 6) is paths.snake(5, 6)
    assert paths.windows(6, 6, [2, 3]) is paths.windows(6, 6, (2, 3))
    assert paths.cross(3, 4) is paths.cross(3, 4)
    assert paths.column(14, 14).with_tokens(0) is paths.column(14, 14).with_tokens(0)


def test_paths_made_at_once_in_two_threads_share_the_table(monkeypatch):
    class Slow(WeakValueDictionary):
        def setdefault(self, key, default=None):
            found = self.get(key)
            time.sleep(0.05)
            if found is None:
                self[key] = found = default
            return found

    monkeypatch.setattr(scan_path, "_TABLES", Slow())
    made = []
    threads = [Thread(target=lambda: made.append(ScanPath([1, 3, 0, 2]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one = made.pop()
    made.clear()  # the other path goes, the table that both name stays
    assert one.order(CPU).tolist() == [1, 3, 0, 2]


def test_paths_take_numbers_of_any_kind():
    assert paths.windows(4, 4, np.array([2, 2])) is paths.windows(4, 4, (2, 2))
    assert paths.windows(4, 4, torch.Size([2, 2])) is paths.windows(4, 4, torch.tensor([2, 2]))
    assert ScanPath(np.arange(4)[::-1]) == ScanPath(torch.arange(4).flip(0)) == ScanPath(range(3, -1, -1))
    assert ScanPath.identity(np.int64(3)).length == 3 and type(ScanPath.reverse(np.int64(3)).length) is int
    for restarts in ([1, 3], (1, 3), range(1, 4, 2), np.array([3, 1])[::-1], np.uint8([1, 3]), torch.tensor([1, 3])):
        assert paths.column(3, 4).with_restarts(restarts).restart_positions().tolist() == [1, 3]
        assert ScanPath.identity(4, restarts=restarts) == ScanPath(range(4), restarts=restarts)


def test_equal_paths_keep_their_own_shape_and_name():
    for path in (paths.row(4, 4), ScanPath.identity(16), paths.row(2, 8)):
        assert path.with_restarts([2]).shape == path.shape and path.with_restarts([2]).name == path.name
        assert path.with_tokens(0).name == f"{path.name} with tokens".strip()


def test_paths_made_under_a_default_device_without_data():
    def made():
        return (
            paths.row(5, 11, restarts=True),
            ScanPath([2, 0, 1], restarts=[1]),
            ScanPath.identity(11, restarts=(3,)),
            paths.concatenate(paths.column(3, 11), ScanPath.reverse(11)).with_restarts([3]).with_tokens(2),
            paths.hilbert8(2)[3],
        )

    with torch.device("meta"):
        under = made()
        tables = [(path.order(CPU), path.restarts(CPU)) for path in under]
    assert under == made()
    for path, (order, restarts) in zip(under, tables, strict=True):
        assert walk_of(path).equal(path.tokens()) and order is path.order(CPU)
        assert (restarts is None) == (not path.restart_positions().numel())


def test_paths_among_fake_tensors():
    with FakeTensorMode() as mode:
        path = paths.snake(5, 13, restarts=True).with_tokens(3)
        others = ScanPath([2, 0, 1]), paths.hilbert8(4)[5], paths.concatenate(paths.row(2, 13), paths.column(2, 13))
        fake = path.order(CPU), path.restarts(CPU)
        assert all(isinstance(table, FakeTensor) and table.fake_mode is mode for table in fake)
        x, bc = torch.randn(2, 66, 4), torch.randn(2, 66, 3)
        assert causal_conv1d(x, torch.randn(4, 3), path=path).shape == x.shape
        y = selective_scan(x, x, torch.randn(4, 3), bc, bc, path=path)
        assert isinstance(y, FakeTensor) and y.shape == x.shape
        with pytest.raises(ValueError, match="order must hold numbers, got a FakeTensor without data on cpu"):
            ScanPath(torch.arange(3))
        with pytest.raises(ValueError, match="must hold numbers, got a FakeTensor without data on cpu"):
            path.with_restarts(torch.arange(3))
    for each in (path, *others):
        assert not isinstance(each.order(CPU), FakeTensor)
        assert walk_of(each).equal(each.tokens())
    real = torch.tensor([1, 2, 0])
    with mode:
        assert ScanPath(real).length == 3
        assert ScanPath(real).with_restarts(real) == ScanPath.of(real, restarts=[0, 1, 2])


def test_equality_is_by_content():
    column = paths.column(3, 4)
    table = ScanPath(column.tokens())
    assert column == table and hash(column) == hash(table)
    assert column != column.flip() and column != paths.column(4, 3) and column != ScanPath.identity(13)
    assert column != paths.column(3, 4, restarts=True)
    assert column.flip() == ScanPath(column.tokens().flip(0))
    assert column.with_restarts([3, 6, 9]) == paths.column(3, 4, restarts=True)
    assert column != "column"


@pytest.mark.parametrize("path", [paths.column(3, 4, restarts=True).flip(), paths.hilbert(3, 4), ScanPath.reverse(4)])
def test_copies_and_pickles_are_equal(path):
    for again in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert again == path
        assert (again.shape, again.name, again.reversed) == (path.shape, path.name, path.reversed)
        assert again.tokens().equal(path.tokens())


def test_the_text_of_a_path():
    assert repr(ScanPath([1, 0, 2], restarts=[1])) == "ScanPath(permutation, length=3, restarts=1)"
    assert repr(ScanPath.reverse(3)) == "ScanPath(line, backwards, length=3, restarts=0)"
    assert repr(paths.column(3, 4)) == "ScanPath(column over 3 x 4, length=12, restarts=0)"


# Tokens put into a path


@given(data=st.data())
@law
def test_tokens_put_into_a_path(data):
    length = data.draw(st.integers(0, 12))
    order = data.draw(st.permutations(range(length)))
    restarts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    at, position = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
    count = data.draw(st.integers(0, 3))
    names = [f"token {token}" for token in range(length)]
    added = [f"added {number}" for number in range(count)]
    rows = [*names[:at], *added, *names[at:]]
    path = ScanPath(order, restarts=restarts)
    longer = path.with_tokens(at, count, position=position)
    visited = [names[token] for token in order]
    assert [rows[token] for token in longer.tokens()] == [*visited[:position], *added, *visited[position:]]
    restarted = [visited[restart] for restart in restarts]
    assert [rows[longer.tokens()[restart]] for restart in longer.restart_positions()] == restarted


def test_class_tokens_of_published_models():
    middle = paths.row(14, 14).with_tokens(98)  # Vim
    assert middle == ScanPath.identity(197)
    assert middle.flip().tokens()[98] == 98
    head = paths.clip(4, 3, 3, "hwt").with_tokens(0)  # VideoMamba, temporal-first
    assert head.tokens()[:6].tolist() == [0, 1, 10, 19, 28, 2]
    assert head.flip().tokens()[-1] == 0
    ends = paths.column(2, 3).with_tokens(0).with_tokens(7)  # a token at either end
    assert ends.tokens().tolist() == [0, 1, 4, 2, 5, 3, 6, 7]
    local = paths.windows(4, 4, 2).with_tokens(8)  # LocalVim: in the middle of the rows and of every order
    assert local.tokens().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 13, 14, 11, 12, 15, 16]


# What the ops make of a path

WALKS = {
    "column": lambda h, w: paths.column(h, w),
    "rows that restart, backwards": lambda h, w: paths.row(h, w, restarts=True).flip(),
    "ragged windows that restart": lambda h, w: paths.windows(h, w, 2, restarts=True),
    "windows backwards": lambda h, w: paths.windows(h, w, (2, 3), restarts=True).flip(),
    "hilbert": lambda h, w: paths.hilbert(h, w),
    "class token": lambda h, w: paths.spiral(h, w).with_tokens(h * w // 2, position=0),
}


@pytest.mark.parametrize("make", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("backend", [b for b in available("selective_scan", reference=True) if b != "triton"])
@given(data=st.data())
@law
def test_a_scan_along_a_path_is_gather_scan_scatter(backend, make, data):
    path = make(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    inputs = selective_scan_inputs(
        2, path.length, 3, 2, dtype=torch.float64, requires_grad=False, device=device_of(backend)
    )
    options = {"return_final_state": True, "backend": backend}
    y, final = selective_scan(**inputs, path=path, **options)
    tokens = path.tokens()
    gathered = {name: value[:, tokens] if name in PER_TOKEN else value for name, value in inputs.items()}
    resets = torch.zeros(2, path.length, dtype=torch.bool, device=device_of(backend))
    resets[:, path.restart_positions()] = True
    expected, expected_final = selective_scan(**gathered, resets=resets, **options)
    same(y[:, tokens], expected)
    same(final, expected_final)
    flipped = selective_scan(**inputs, path=path.flip(), **options)
    turned = {name: value.flip(1) if name in PER_TOKEN else value for name, value in gathered.items()}
    ends = torch.zeros_like(resets)
    ends[:, [path.length - p if p else 0 for p in path.restart_positions().tolist()]] = True
    expected, expected_final = selective_scan(**turned, resets=ends, **options)
    same(flipped.y[:, tokens.flip(0)], expected)
    same(flipped.final_state, expected_final)


@pytest.mark.parametrize("backend", [b for b in available("selective_scan", reference=True) if b != "triton"])
def test_segments_between_restarts_are_scans_of_their_own(backend):
    path = paths.windows(5, 7, 3, restarts=True)
    inputs = selective_scan_inputs(
        1, 35, 3, 2, requires_grad=False, optional=("D", "z"), dtype=torch.float64, device=device_of(backend)
    )
    for each, direction in ((path, 1), (path.flip(), -1)):
        y = selective_scan(**inputs, path=each, backend=backend)
        i, j = torch.arange(35) // 7, torch.arange(35) % 7
        for window in {(int(a) // 3, int(b) // 3) for a, b in zip(i, j, strict=True)}:
            tokens = torch.nonzero((i // 3 == window[0]) & (j // 3 == window[1])).flatten()
            tokens = tokens if direction == 1 else tokens.flip(0)
            part = {name: value[:, tokens] if name in PER_TOKEN else value for name, value in inputs.items()}
            same(y[:, tokens], selective_scan(**part, backend=backend))


def test_several_routes_over_the_same_tokens_carry_the_state_from_call_to_call():
    inputs = selective_scan_inputs(1, 12, 3, 2, requires_grad=False, optional=("D",), dtype=torch.float64)
    routes = (paths.row(3, 4).flip(), paths.column(3, 4), paths.column(3, 4).flip())  # MSVMamba's coarse routes
    thrice = {name: torch.cat([value] * 3, 1) if name in PER_TOKEN else value for name, value in inputs.items()}
    y, final = selective_scan(**thrice, path=paths.concatenate(*routes), return_final_state=True)
    state = None
    for number, route in enumerate(routes):
        part, state = selective_scan(**inputs, path=route, initial_state=state, return_final_state=True)
        same(part, y[:, 12 * number : 12 * (number + 1)])
    same(state, final)


def test_compile_and_export_with_paths_made_inside():
    class Layer(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            y = selective_scan(x, dt, A, B, C, dt_softplus=True, path=paths.column(14, 14))
            for path in (*paths.cross(14, 14), paths.windows(14, 14, 7, restarts=True).flip(), paths.hilbert(14, 14)):
                y = y + selective_scan(x, dt, A, B, C, dt_softplus=True, path=path)
            longer = torch.cat([x[:, :1], x], dim=1)
            routed = causal_conv1d(longer, A[:, :3], path=paths.column(14, 14).with_tokens(0))
            return y + routed[:, 1:]

    inputs = selective_scan_inputs(1, 196, 4, 3, optional=(), requires_grad=False)
    args = tuple(inputs[name] for name in ("x", "dt", "A", "B", "C"))
    expected = Layer()(*args)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(compiled(*args), expected)
    for strict in (True, False):
        program = torch.export.export(Layer(), args, strict=strict)
        torch.testing.assert_close(program.module()(*args), expected)


def test_compile_and_export_with_lines_and_restarts_made_inside():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            length, y = x.shape[1], x
            for path in (
                paths.column(3, 4).with_restarts([2, 7]),
                paths.column(3, length // 3).with_restarts((length // 2,)).flip(),
                paths.row(3, 4).with_restarts(range(1, 9, 3)),
                ScanPath.identity(length, restarts=[length // 3]),
                ScanPath.reverse(length),
            ):
                y = y + causal_conv1d(x, weight, path=path)
            return y

    args = torch.randn(1, 12, 4), torch.randn(4, 3)
    expected = Layer()(*args)
    for dynamic in (False, True):
        compiled = torch.compile(Layer(), fullgraph=True, dynamic=dynamic, backend="eager")
        torch.testing.assert_close(compiled(*args), expected)
    for strict in (True, False):
        before = len(kept._NAMES)
        program = torch.export.export(Layer(), args, strict=strict)
        torch.testing.assert_close(program.module()(*args), expected)
    assert len(kept._NAMES) == before  # what holds its tables itself leaves none behind


def test_compile_with_sizes_that_change():
    def scanned(x_BYXD):
        rows, columns = x_BYXD.shape[1:3]
        path = paths.column(rows, columns, restarts=True)
        return causal_conv1d(x_BYXD.flatten(1, 2), torch.ones(3, 2), path=path)

    compiled = torch.compile(scanned, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((1, 3, 4, 3), (2, 3, 5, 3), (1, 6, 7, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), scanned(x))


# What is refused

REFUSED = {
    "twice": (lambda: ScanPath([0, 1, 1]), "order must be a permutation of 0..2: token 1 is visited 2 times"),
    "outside": (lambda: ScanPath([0, 3, 1]), "order must be a permutation of 0..2: it holds 3"),
    "fractions": (lambda: ScanPath(torch.rand(3)), "order must be one-dimensional and of integers, got shape"),
    "restart outside": (lambda: ScanPath([0, 1], restarts=[2]), r"restarts must lie in 0\.\.1, got \[2\]"),
    "restart of fractions": (lambda: ScanPath([0, 1], restarts=[0.5]), "restarts must be positions of the walk"),
    "negative length": (lambda: ScanPath.identity(-1), "length must be an integer of at least 0, got -1"),
    "too long": (lambda: paths.column(2**16, 2**15), r"fewer than 2\*\*31 tokens, got 2147483648"),
    "length of fractions": (lambda: ScanPath.identity(3.0), "length must be an integer of at least 0, got 3.0"),
    "length of a switch": (lambda: ScanPath.reverse(True), "length must be an integer of at least 0, got True"),
    "walk of fractions": (
        lambda: ScanPath.of(Strides((3.0,), (1,))),
        "sizes of walk must be an integer of at least 0, got 3.0",
    ),
    "steps of fractions": (lambda: ScanPath.of(Strides((3,), (1.0,))), "strides of walk must be an integer, got 1.0"),
    "a step too few": (lambda: ScanPath.of(Strides((3, 2), (1,))), "walk must have one stride for each size"),
    "walk of an array of fractions": (lambda: ScanPath.of(np.ones(2)), "walk must be one-dimensional and of integers"),
    "ragged": (lambda: ScanPath([[0], [1, 2]]), "order must hold integers, got list"),
    "no data": (lambda: ScanPath([0, 1], restarts=torch.ones(1, device="meta")), "restarts must hold numbers, got a"),
    "window of fractions": (
        lambda: paths.windows(4, 4, (2.0, 2.0)),
        "window must be an integer of at least 1, got 2.0",
    ),
    "restarts of fractions": (
        lambda: ScanPath.identity(4, restarts=torch.ones(2, dtype=torch.bfloat16)),
        "restarts must be positions of the walk, integers, got float64",
    ),
    "token of fractions": (lambda: paths.row(2, 2).with_tokens(1.0), "at must be an integer, got 1.0"),
    "shape": (lambda: ScanPath([0, 1], shape=(3, 1)), r"shape must hold the 2 tokens of the path, got \(3, 1\)"),
    "token outside": (lambda: paths.row(2, 2).with_tokens(5), r"at must lie in 0\.\.4, the length of the path, got 5"),
    "position outside": (lambda: paths.row(2, 2).with_tokens(0, position=-1), "position must lie in 0..4"),
    "fewer than none": (lambda: paths.row(2, 2).with_tokens(0, -1), "count must not be negative, got -1"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
