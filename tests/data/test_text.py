"""Text: files as one row, windows, splits, bits per byte against the formula, gzip against gzip."""

import gzip
import itertools
import math
import multiprocessing
import os
import pickle
import resource
import weakref

import numpy as np
import pytest
import torch

from ssmkit.data.text import (
    Piece,
    Text,
    TextError,
    TextWindows,
    bits_per_byte,
    gzip_bits_per_byte,
    keep_open,
    opened,
    scored_windows,
    some_windows,
    split_text,
    text_files,
)


def make_files(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.fixture
def text(tmp_path):
    return Text.of(*make_files(tmp_path, {"a": b"abc", "b": b"", "c": b"d", "e": bytes(range(60, 100))}))


def test_files_are_one_row_with_a_nul_before_each(text):
    row = b"\0abc\0d\0" + bytes(range(60, 100))
    assert len(text) == len(row)
    assert text.nbytes == len(row) - 3
    assert [piece.path.name for piece in text.pieces] == ["a", "c", "e"]
    for start in range(len(row)):
        for count in (0, 1, 2, 7, 50, 120):
            expected = (row * 4)[start : start + count]
            assert text.read(start, count).tobytes() == expected, (start, count)
            assert text.read(start + 3 * len(row), count).tobytes() == expected


def test_a_file_that_has_shrunk_is_noticed(tmp_path):
    (path,) = make_files(tmp_path, {"a": b"abc"})
    with pytest.raises(TextError, match=r"a has become shorter since it was opened"):
        Text([Piece(path, 0, 4)]).read(0, 3)


CHANGES = {
    "cut short": lambda path: os.truncate(path, 5000),
    "emptied": lambda path: path.write_bytes(b""),
    "written anew": lambda path: (path.write_bytes(b"z" * 10_000), os.utime(path, ns=(0, 1))),
    "longer": lambda path: path.write_bytes(b"z" * 10_001),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("read_before", [False, True], ids=["not yet read", "read before"])
def test_a_file_that_is_written_to_is_refused(change, read_before, tmp_path):
    (path,) = make_files(tmp_path, {"corpus": b"a" * 10_000})
    text = Text.of(path)
    if read_before:
        assert text.read(0, 3).tobytes() == b"\0aa"
    change(path)
    for start in (0, 100, 9000):
        with pytest.raises(TextError, match=r"corpus has changed since it was opened; start again"):
            text.read(start, 50)


def test_a_file_that_is_replaced_is_read_on_where_it_is_open(tmp_path):
    path, other = make_files(tmp_path, {"corpus": b"a" * 100, "other": b"z" * 200})
    text, unread = Text.of(path), pickle.loads(pickle.dumps(Text.of(path)))
    assert text.read(1, 3).tobytes() == b"aaa"
    os.replace(other, path)
    assert text.read(60, 30).tobytes() == b"a" * 30
    assert Text.of(path).read(60, 30).tobytes() == b"z" * 30
    keep_open.cache_clear()
    for refused in (text, unread):
        with pytest.raises(TextError, match=r"corpus has changed since it was opened"):
            refused.read(60, 30)


def in_a_worker(text, answers):
    answers.put(text.read(2, 4).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_on(method, tmp_path):
    """The files that are open here are not moved by what is read elsewhere."""
    text = Text.of(*make_files(tmp_path, {"a": bytes(range(1, 90))}))
    assert text.read(0, 3).tobytes() == b"\0\1\2"
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    worker = context.Process(target=in_a_worker, args=(text, answers))
    worker.start()
    assert answers.get() == text.read(2, 4).tobytes() == bytes(range(2, 6))
    worker.join()
    assert worker.exitcode == 0


def test_only_the_files_read_last_are_open(tmp_path):
    """More files than stay open, and none is left open behind."""
    names = {f"{i:03}": bytes([1 + i % 250]) * 3 for i in range(300)}
    text = Text.of(*make_files(tmp_path, names))
    assert text.read(0, len(text)).tobytes() == b"".join(b"\0" + content for content in names.values())
    assert keep_open.cache_info().currsize == 32
    alive = [weakref.ref(opened(piece.path, text.stamps[piece.path])) for piece in text.pieces[-3:]]
    descriptors = [file().descriptor for file in alive]
    keep_open.cache_clear()
    assert [file() for file in alive] == [None] * 3
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_fewer_descriptors_than_files_kept_open(tmp_path):
    names = {f"{i:02}": bytes([1 + i]) * 3 for i in range(40)}
    text = Text.of(*make_files(tmp_path, names))
    keep_open.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
    try:
        row = text.read(0, len(text)).tobytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert row == b"".join(b"\0" + content for content in names.values())


def test_another_file_of_the_same_size_and_time_is_not_taken_for_the_one_read_before(tmp_path):
    path, other = make_files(tmp_path, {"corpus": b"a" * 9, "other": b"z" * 9})
    for file in (path, other):
        os.utime(file, ns=(5, 5))
    assert Text.of(path).contents(0).tobytes() == b"a" * 9
    os.replace(other, path)
    assert Text.of(path).contents(0).tobytes() == b"z" * 9


def test_a_file_that_is_gone_is_named(tmp_path):
    (path,) = make_files(tmp_path, {"corpus": b"abc"})
    text = Text.of(path)
    path.unlink()
    with pytest.raises(TextError, match=r"corpus is no longer there; start again"):
        text.read(0, 2)


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    make_files(tmp_path, {"corpus": b"abc"})
    monkeypatch.chdir(tmp_path)
    text = Text.of("corpus")
    monkeypatch.chdir("/")
    assert text.contents(0, 1).tobytes() == b"bc"
    for at in (-1, 4):
        with pytest.raises(ValueError, match=rf"at must lie in 0\.\.3, the bytes of .*corpus, got {at}"):
            text.contents(0, at)


def test_a_text_without_a_byte_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"a text needs at least one byte, got none in .*a"):
        Text.of(*make_files(tmp_path, {"a": b""}))


SOURCES = {
    "a file, whatever it holds": (["docs/picture.png"], ["docs/picture.png"]),
    "a folder": (["docs"], ["docs/a.txt", "docs/deep/b.py"]),
    "a pattern": (["**/*.py"], ["c.py", "docs/deep/b.py"]),
    "two that overlap": (["c.py", "**/*.py"], ["c.py", "docs/deep/b.py"]),
}


@pytest.mark.parametrize(("sources", "expected"), SOURCES.values(), ids=SOURCES)
def test_sources_name_files(sources, expected, tmp_path, monkeypatch):
    make_files(
        tmp_path,
        {
            "docs/a.txt": b"a",
            "docs/deep/b.py": b"b",
            "docs/.hidden": b"h",
            "docs/.git/config": b"g",
            "docs/empty.txt": b"",
            "docs/picture.png": b"P\0",
            "c.py": b"c",
        },
    )
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in text_files(sources)] == expected


def test_the_standard_library_is_a_source():
    files = text_files(["stdlib"])
    names = {path.name for path in files}
    assert {"argparse.py", "ast.py"} <= names
    assert all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test"} & set(path.parts) for path in files)


@pytest.mark.parametrize("source", ["nothing.txt", "*.nothing", "."])
def test_a_source_without_text_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no text at .*; give files, folders, patterns or 'stdlib'"):
        text_files([source])


def test_whole_files_are_held_out(tmp_path):
    """About the share that was asked for, nothing in both, the same files wherever the folder lies."""
    rng = np.random.default_rng(0)
    contents = {f"{i % 7}/{i}.txt": bytes(rng.integers(32, 127, 100 + 13 * i, np.uint8)) for i in range(60)}
    chosen = []
    for folder in ("here", "there/deeper"):
        files = make_files(tmp_path / folder, contents)
        train, held_out = split_text(files, 0.2)
        names = [{piece.path.relative_to(tmp_path / folder) for piece in part.pieces} for part in (train, held_out)]
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == 60
        total = train.nbytes + held_out.nbytes
        assert total == sum(map(len, contents.values()))
        assert 0.18 * total < held_out.nbytes <= 0.2 * total
        chosen.append(names[1])
    assert chosen[0] == chosen[1]


def test_the_tail_of_each_file_is_held_out(tmp_path):
    files = make_files(tmp_path, {"a": bytes(range(100)), "b": bytes(range(100, 150))})
    train, held_out = split_text(files, 0.1, "tail")
    assert [part.contents(i).tolist() for part in (train, held_out) for i in range(2)] == [
        list(range(90)),
        list(range(100, 145)),
        list(range(90, 100)),
        list(range(145, 150)),
    ]
    by_default = split_text(files[:1], 0.1)
    assert [part.pieces for part in by_default] == [part.pieces[:1] for part in (train, held_out)]
    assert train.fingerprint != by_default[0].fingerprint


BAD_SPLITS = {
    "all of it": ({"fraction": 1.0}, r"fraction must lie in \(0, 1\), got 1.0"),
    "an unknown way": ({"fraction": 0.1, "by": "line"}, "split must be 'file' or 'tail', got 'line'"),
    "no small file": ({"fraction": 0.1, "by": "file"}, "nothing is held out when a share of 0.1 of 2 files"),
    "too little": ({"fraction": 0.001}, "nothing is held out when"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_bad_splits_are_refused(options, message, tmp_path):
    with pytest.raises(TextError, match=message):
        split_text(make_files(tmp_path, {"a": b"a" * 100, "b": b"b" * 100}), **options)


def test_windows_are_drawn_by_seed_step_and_rank(text):
    windows = TextWindows(text, 5)
    batch = windows.batch(8, seed=1, step=2)
    assert batch.shape == (8, 6)
    assert batch.dtype == torch.int64
    row = text.read(0, 2 * len(text)).tobytes()
    assert all(bytes(window.tolist()) in row for window in batch)
    assert torch.equal(batch, windows.batch(8, seed=1, step=2))
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1, "step": 2, "rank": 1}):
        assert not torch.equal(batch, windows.batch(8, **other))


def test_every_position_is_drawn_alike(text):
    counts = np.zeros(256)
    for step in range(200):
        np.add.at(counts, TextWindows(text, 2).batch(32, seed=0, step=step)[:, 0].numpy(), 1)
    expected = np.bincount(text.read(0, len(text)), minlength=256) * 6400 / len(text)
    assert (counts[expected == 0] == 0).all()
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected.max())


def test_consecutive_windows_follow_one_another(text):
    windows = TextWindows(text, 5, consecutive=True)
    batches = [windows.batch(3, seed=4, step=step) for step in range(40)]
    for one, other in itertools.pairwise(batches):
        assert torch.equal(one[:, -1], other[:, 0])
    walked = bytes(torch.cat([batch[0, :-1] for batch in batches]).tolist())
    assert walked in text.read(0, 6 * len(text)).tobytes()


@pytest.mark.parametrize("context", [2, 3, 8, 100])
def test_every_byte_is_scored_once_and_with_half_a_window_before_it(text, context):
    scored = np.zeros(len(text), int)
    for start, length, skip in scored_windows(text, context):
        assert length <= context
        begin = max(piece_start for piece_start in text.starts.tolist() if piece_start <= start)
        assert skip + 1 >= min(context // 2, start + skip - begin)
        scored[start + 1 + skip : start + 1 + length] += 1
    assert (scored[text.read(0, len(text)) != 0] == 1).all()
    assert (scored[text.read(0, len(text)) == 0] == 0).all()


def bigram(logits):
    return lambda ids: logits[ids]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_bits_per_byte_is_the_formula(text, batch_size):
    """A model that sees one byte back is scored alike in any window, so the formula can be written down."""
    torch.manual_seed(0)
    logits = torch.randn(256, 256)
    row = text.read(0, len(text)).tolist()
    bits = [
        -math.log2(math.exp(logits[before, byte]) / float(logits[before].exp().sum()))
        for before, byte in itertools.pairwise(row)
        if byte != 0
    ]
    assert len(bits) == text.nbytes
    actual = bits_per_byte(bigram(logits), text, scored_windows(text, 8), batch_size=batch_size)
    assert actual == pytest.approx(sum(bits) / len(bits), rel=1e-6)


def test_a_model_that_knows_nothing_needs_eight_bits(text):
    assert bits_per_byte(bigram(torch.zeros(256, 256)), text, scored_windows(text, 8)) == pytest.approx(8, rel=1e-6)


def test_some_windows_score_about_as_much_as_asked(tmp_path):
    text = Text.of(*make_files(tmp_path, {"a": b"a" * 10_000, "b": b"b" * 3_000}))
    windows, some = list(scored_windows(text, 64)), list(some_windows(text, 64, 1000))
    assert set(some) < set(windows)
    assert 700 < sum(window.length - window.skip for window in some) < 1300
    assert list(some_windows(text, 64, 10**9)) == windows


def test_gzip_is_gzip(tmp_path):
    contents = [f"line {i % 7}\n".encode() * 50 + bytes(range(256)) for i in range(5)]
    text = Text.of(*make_files(tmp_path, {str(i): content for i, content in enumerate(contents)}))
    total = sum(map(len, contents))
    each = 8 * sum(len(gzip.compress(content, 9)) for content in contents) / total
    together = 8 * len(gzip.compress(b"".join(contents), 9)) / total
    assert gzip_bits_per_byte(text) == pytest.approx((each, together), rel=1e-12)
    assert together < each
