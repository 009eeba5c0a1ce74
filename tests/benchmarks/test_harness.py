"""The harness: it refuses to time what does not match, pairs its windows, keeps its files whole."""

import importlib
import itertools
import json
import statistics
from dataclasses import asdict
from typing import ClassVar

import pytest
import torch

import ssmkit.ops
from benchmarks import (
    Absent,
    Bench,
    Rival,
    candidate,
    cli,
    document,
    machine,
    register,
    registry,
    report,
    timing,
    worker,
)
from benchmarks.candidate import Candidate, Spec, Wrong, peak_of
from benchmarks.runner import Plan, Runner
from benchmarks.timing import Pair, Summary
from benchmarks.worker import Server, Unmeasured, Worker, answer_of
from ssmkit.cli import COMMANDS, main
from tests.benchmarks import toy

MODULE = toy.__name__
SECONDS = {"ssmkit": 0.01}  # of one call, in windows that take no time; 0.02 for others


class InProcess:
    """A worker without a process, whose windows take no time; it remembers what was asked of it."""

    asked: ClassVar[list] = []

    def __init__(self, environment):
        self.server = Server()

    def ask(self, command, timeout=0.0, **arguments):
        held = self.server.candidate
        self.asked.append((command, arguments.get("candidate") or (held and held.spec.candidate)))
        if command in ("window", "limits"):
            wall = SECONDS.get(held.spec.candidate, 0.02) * arguments.get("calls", 1)
            rates = {"copy": 1e10, "exp": 1e9, "fma": 1e10}
            window = {"wall": wall, "cpu": wall, "waited": 0.0, "busy": wall}
            return window | ({"rates": rates} if command == "limits" else {})
        return answer_of(self.server.carry_out(command, arguments))

    def close(self):
        self.server.release()


@pytest.fixture
def run(monkeypatch):
    """Run a plan on the toy benchmark in this process, without sleeping."""
    monkeypatch.setattr(InProcess, "asked", [])
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    # Collecting garbage at every turn takes most of the time here; a test of its own measures memory.
    monkeypatch.setattr(candidate, "release_memory", lambda: None)
    monkeypatch.setattr(worker, "release_memory", lambda: None)

    def run(keep=lambda results: None, **plan):
        plan = {"rounds": 3, "shapes": ("few rows",), "rivals": ("right", "wrong"), **plan}
        return Runner(Plan(bench="doubled", **plan), start=InProcess, say=lambda line: None).run(keep)

    return run


def rows(results, cell=0):
    return {row["name"]: row for row in results["cells"][cell]["rows"]}


def test_a_wrong_rival_is_reported_and_not_timed(run):
    found = rows(run())
    assert found["right"]["status"] == "ok"
    assert found["wrong"]["status"] == "wrong"
    assert "relative RMS error 0.005, allowed 0.0001" in found["wrong"]["reason"]
    assert "time" not in found["wrong"]
    assert {("check", "wrong"), ("window", "right"), ("window", "ssmkit")} <= set(InProcess.asked)
    assert ("window", "wrong") not in InProcess.asked


def test_nothing_at_all_is_timed_when_our_own_op_is_wrong(run, monkeypatch):
    monkeypatch.setenv("TOY_WRONG", "1")
    found = rows(run())
    assert list(found) == ["ssmkit"]
    assert found["ssmkit"]["status"] == "wrong"
    assert not [asked for asked in InProcess.asked if asked[0] in ("window", "limits")]


def test_our_own_op_is_held_to_the_bounds_of_the_tests(tmp_path, monkeypatch):
    spec = Spec(module=MODULE, bench="doubled", sizes={"rows": 4})
    path = tmp_path / "expected.pt"
    expected = 2 * Candidate(spec).inputs["x"].double()
    torch.save({"y": expected * (1 + 1e-5)}, path)
    with pytest.raises(Wrong, match="RMS error 1e-05"):
        Candidate(spec).check(path)
    # The same error passes for a rival, which has only to compute the same thing.
    errors = Candidate(Spec(**{**asdict(spec), "candidate": "right"})).check(path)
    assert errors["y"] == pytest.approx(1e-5, rel=0.02)


def test_a_wrong_gradient_is_found(run):
    found = rows(run(modes=("fwdbwd",), rivals=("right", "wrong gradient")))
    assert found["right"]["status"] == "ok"
    assert set(found["right"]["errors"]) == {"y", "dx"}
    assert found["wrong gradient"]["status"] == "wrong"
    assert found["wrong gradient"]["reason"].startswith("dx:")


def test_absent_missing_and_declining_rivals_say_why(run):
    found = rows(run(rivals=("absent", "missing", "picky")))
    assert found["absent"] == {"name": "absent", "status": "absent", "reason": "pip install it"}
    assert found["missing"]["status"] == "absent"
    assert "a_module_that_is_not_there" in found["missing"]["reason"]
    assert found["picky"]["status"] == "declined"
    assert found["picky"]["reason"] == "not 4 rows"
    backward = rows(run(rivals=("forward only",), modes=("fwdbwd",)))
    assert backward["forward only"]["reason"] == "has no fwdbwd"


def test_a_set_up_rival_is_compared_in_our_terms(run):
    found = rows(run(rivals=("set up",), modes=("fwdbwd",)))
    assert found["set up"]["status"] == "ok"
    assert found["set up"]["errors"] == {"y": 0.0, "dx": pytest.approx(0.0, abs=1e-12)}


def test_rivals_for_another_device_are_left_out():
    bench = registry.find("doubled")
    assert bench.rivals_on("cuda") == ["for a GPU"]
    assert set(bench.rivals_on("cpu")) == set(bench.rivals) - {"for a GPU"}


def test_variants_tell_of_scaling_dtypes_capabilities_and_backward(run):
    results = run(
        modes=("fwdbwd",), threads=(1, 2), dtypes=("float32", "bfloat16"), capabilities=("auto", "avx2"), rivals=()
    )
    settings = [(cell["dtype"], cell["mode"], cell["threads"]) for cell in results["cells"]]
    assert settings == list(itertools.product(("float32", "bfloat16"), ("fwdbwd",), (1, 2)))
    assert list(rows(results, 0)) == ["ssmkit", "ssmkit, avx2", "ssmkit, fwd alone"]
    assert list(rows(results, 3)) == [
        "ssmkit", "ssmkit, avx2", "ssmkit, 1 thread", "ssmkit, float32", "ssmkit, fwd alone",
    ]  # fmt: skip


def test_shapes_then_sweep(run):
    results = run(shapes=())
    assert [cell["shape"] for cell in results["cells"]] == ["few rows", "many rows", "rows=16"]
    assert results["cells"][2]["cost"] == {"bytes_moved": 1024.0, "fmas": 128.0}


def test_a_reference_that_fails_leaves_its_cells_untimed(run, monkeypatch):
    def save_expected(self, path):
        raise MemoryError("too large")

    monkeypatch.setattr(Server, "save_expected", save_expected)
    found = rows(run())
    assert found["ssmkit"]["status"] == "failed"
    assert "No such file" in found["ssmkit"]["reason"]
    assert not [asked for asked in InProcess.asked if asked[0] == "window"]


def test_what_a_run_reports(run):
    results = run()
    cell = results["cells"][0]
    assert cell["limit"]["binding"] == "memory"
    assert cell["limit"]["seconds"]["median"] == pytest.approx(4 * 8 * 2 * 4 / 1e10)
    ours = rows(results)["ssmkit"]
    assert ours["time"]["median"] == pytest.approx(0.01)
    assert rows(results)["right"]["ratio"]["median"] == pytest.approx(2.0)
    assert ours["memory"]["tensors"] == 2 * 4 * 8 * 4
    written = report.text(results)
    for part in (
        f"few rows (rows 4): float32 fwd, 1 thread, {machine.capability()}",
        "ssmkit",
        "wrong",
        "bound by memory",
        results["commit"],
    ):
        assert part in written


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"shapes": ("no such",)}, "no shape of doubled is called 'no such'; there are: few rows"),
        ({"rivals": ("no such",)}, "doubled has no rival 'no such'; there are: right"),
        ({"modes": ("bwd",)}, "mode must be fwd or fwdbwd, got 'bwd'"),
        ({"allocator": "huge"}, "allocator must be one of no mmap, default; got 'huge'"),
        ({"bench": "no_such"}, "no benchmark is called 'no_such'; there are: .*selective_scan"),
    ],
)
def test_bad_plans_are_refused_with_the_known_names(plan, message):
    with pytest.raises(ValueError, match=message):
        Runner(Plan(**{"bench": "doubled", **plan}), start=InProcess)


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="either call or prepare"):
        Rival()
    with pytest.raises(ValueError, match="shapes or a sweep"):
        Bench(op=toy.doubled, inputs=toy.inputs)
    with pytest.raises(ValueError, match="registered twice"):
        register(registry.find("doubled"))


@pytest.mark.parametrize("op", ssmkit.ops.__all__)
def test_every_op_has_a_benchmark_that_states_its_cost(op):
    bench = registry.find(op)
    assert bench.name == op
    cases = list(bench.cases())
    assert cases
    for (label, sizes), mode in itertools.product(cases, bench.modes):
        cost = bench.cost(sizes, torch.float32, mode)
        assert cost.get("bytes_moved", 0) > 0, f"{label}: how many bytes does {op} move?"
        assert all(count > 0 for count in cost.values()), f"{label}: {cost}"


def paired(loads, base, other, rounds):
    """Rounds of two sides whose calls take the given seconds, while others use the given cores, a value per round."""
    order = []

    def side(name, seconds):
        seconds = itertools.cycle(seconds)

        def window(calls):
            wall, load = next(seconds) * calls, loads[min(len(order) // 2, len(loads) - 1)]
            order.append(name)
            return {"wall": wall, "cpu": wall, "waited": 0.0, "busy": wall * (1 + load)}

        return window

    sides = side("base", base), side("other", other)
    return timing.paired_rounds(sides[0], 1, sides[1], 1, rounds=rounds, pause=lambda seconds: None), order


def test_windows_alternate_and_drift_cancels_in_the_ratio():
    drift = [1.0, 1.5, 2.0, 3.0]
    pairs, order = paired([0.0], drift, [10 * x for x in drift], rounds=4)
    assert order == ["base", "other"] * 4
    assert Summary.of([pair.other / pair.base for pair in pairs]) == Summary(10.0, 10.0, 10.0, 10.0, 10.0, 4)


def test_rounds_under_foreign_load_are_repeated():
    pairs, order = paired([0.5, 0.0, 0.8, 0.0], [1.0, 2.0, 3.0, 4.0], [5.0], rounds=2)
    assert [pair.base for pair in pairs] == [2.0, 4.0]
    assert len(order) == 8


def test_on_a_machine_that_is_never_quiet_the_least_loaded_rounds_count():
    pairs, _ = paired([0.5, 0.3, 0.9, 0.4, 0.8, 0.7], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0], rounds=2)
    # By load (0.3 and 0.4), not by time.
    assert [pair.base for pair in pairs] == [5.0, 3.0]
    assert not any(pair.quiet for pair in pairs)


def test_time_spent_waiting_for_a_cpu_counts_as_load():
    assert Pair(1.0, 1.0, foreign=0.0, waited=0.0).quiet
    assert not Pair(1.0, 1.0, foreign=0.0, waited=0.2).quiet
    assert not Pair(1.0, 1.0, foreign=0.5, waited=0.0).quiet


def test_quartiles():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    assert Summary.of(values) == Summary(median, q1, q3, 1.0, 9.0, 7)
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0, 2.0, 2.0, 1)


def test_calibration_fills_the_window():
    asked = []

    def side(calls):
        asked.append(calls)
        return {"wall": 0.001 * calls, "cpu": 0.0, "waited": 0.0, "busy": 0.0}

    assert timing.calibrate(side, window=0.25) == 250
    assert asked[0] == 1
    assert timing.calls_for(3.0) == 1


def test_the_limit_is_the_larger_of_memory_and_arithmetic():
    rates = {"copy": 10.0, "exp": 4.0, "fma": 20.0, "product": 40.0}
    assert machine.seconds_at_best({"bytes_moved": 100, "exps": 4, "fmas": 20}, rates) == (10.0, "memory")
    assert machine.seconds_at_best({"bytes_moved": 10, "exps": 4, "fmas": 20}, rates) == (2.0, "arithmetic")
    assert machine.seconds_at_best({"exps": 4, "products": 80}, rates) == (3.0, "arithmetic")
    assert machine.seconds_at_best({"bytes_moved": 10, "exps": 4}, {"copy": 10.0}) is None
    assert machine.seconds_at_best({}, rates) is None


def test_measured_limits_are_positive():
    rates = machine.measure_limits(1)
    assert rates["copy"] > 1e8
    assert all(rate > 1e6 for rate in rates.values())


def test_peak_memory_is_that_of_the_call():
    held = []

    def call():
        # Ones, so that the pages are touched; half of it is gone before the other half comes.
        torch.ones(2**23)
        held.append(torch.ones(2**23))

    peak = peak_of(call, "cpu")
    assert 2**25 <= peak < 1.5 * 2**25


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "out.json"
    report.write_json({"cells": [1]}, path)
    with pytest.raises(TypeError):
        report.write_json({"cells": [2], "bad": object()}, path)
    assert json.loads(path.read_text()) == {"cells": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
    report.write_json({"cells": [3]}, path)
    assert json.loads(path.read_text()) == {"cells": [3]}


def test_a_run_keeps_what_it_has_and_joins_what_is_on_file(run):
    seen = []
    first = run(shapes=("few rows", "many rows"), keep=lambda results: seen.append(len(results["cells"])))
    assert seen == [1, 2]
    again = run(shapes=("many rows",), rivals=())
    joined = report.merged(first, again)
    assert [cell["shape"] for cell in joined["cells"]] == ["few rows", "many rows"]
    assert list(rows(joined, 0)) == ["ssmkit", "right", "wrong"]
    assert list(rows(joined, 1)) == ["ssmkit", "right", "wrong"]
    assert rows(joined, 1)["ssmkit"] == rows(again)["ssmkit"]
    # Another commit: what the same cell held was measured against other code.
    before = {**first, "cells": [{**cell, "commit": "older"} for cell in first["cells"]]}
    assert list(rows(report.merged(before, again), 1)) == ["ssmkit"]
    # Another version of a library: what was measured with the old one is dropped.
    assert report.merged({**first, "versions": {"torch": "0.1"}}, again)["cells"] == again["cells"]
    assert report.merged(None, again) == again


def test_results_survive_json_and_become_a_page_and_a_plot(run, tmp_path):
    results = run(rivals=("right", "wrong", "absent"), threads=(1, 2))
    report.write_json(results, tmp_path / "results" / results["folder"] / "doubled.json")
    page = document.document(tmp_path / "results")
    assert "### doubled: float32 fwd, 2 threads, " in page
    assert f"commit {results['commit']}" in page
    for line in ("| | few rows (4) |", "| ssmkit | 10 ms |", "| right | 2x [2, 2]; 20 ms |", "| wrong | wrong |"):
        assert line in page
    assert "| absent |" not in page
    assert "- absent: pip install it" in page
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_in_docs_is_the_one_the_files_give():
    assert document.DOCUMENT.read_text() == document.document(), "run python -m benchmarks.document"


def test_a_worker_process(tmp_path):
    """One process through its life: ready, checked, timed, measured, and a candidate that takes it down."""
    spec = asdict(Spec(module=MODULE, bench="doubled", sizes={"rows": 4}, mode="fwdbwd"))
    path = str(tmp_path / "expected.pt")
    process = Worker({})
    try:
        process.ask("ready", **{**spec, "candidate": "reference"})
        process.ask("save_expected", path=path)
        process.ask("ready", **{**spec, "candidate": "right"})
        assert process.ask("check", path=path) == {"errors": {"y": 0.0, "dx": 0.0}, "notes": []}
        window = process.ask("window", calls=3, alone=False)
        assert window["wall"] > 0
        assert window["cpu"] > 0
        assert process.ask("peak_memory")["tensors"] == 4 * 4 * 8 * 4
        process.ask("ready", **{**spec, "candidate": "wrong"})
        with pytest.raises(Unmeasured) as wrong:
            process.ask("check", path=path)
        assert wrong.value.status == "wrong"
        process.ask("ready", **{**spec, "candidate": "dies"})
        with pytest.raises(Unmeasured, match="ended with status 3"):
            process.ask("check", path=path)
        with pytest.raises(Unmeasured, match="ended"):
            process.ask("window", calls=1, alone=False)
    finally:
        process.close()


def test_absent_is_said_by_the_rival_itself():
    with pytest.raises(Absent, match="pip install it"):
        Candidate(Spec(module=MODULE, bench="doubled", sizes={"rows": 4}, candidate="absent")).call()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for part in ("selective_scan --mode fwd,fwdbwd", "--capability", "--allocator", "matched the float64 reference"):
        assert part in shown


def test_list_names_shapes_and_rivals(capsys):
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "selective_scan",
        "Mamba-130M, 1024 tokens: batch 1, seqlen 1024, dim 1536, dstate 16",
        "ggml ssm_scan",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which op? "),
        (["no_such"], "no benchmark is called 'no_such'"),
        (["selective_scan", "--shape", "moon"], "no shape of selective_scan is called 'moon'"),
        (["selective_scan", "--rivals", "moon"], "has no rival 'moon'"),
        (["selective_scan", "--mode", "sideways"], "mode must be fwd or fwdbwd"),
    ],
)
def test_bad_commands_are_refused(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_results_are_filed_in_a_checkout_only(monkeypatch, tmp_path, capsys):
    assert document.in_checkout()
    monkeypatch.setattr(document, "ROOT", tmp_path / "ssmkit" / "benchmarks")
    assert cli.main(["selective_scan", "--file"]) == 2
    assert "name a file with --json" in capsys.readouterr().err


def test_ssmkit_bench_is_the_same_command(capsys):
    assert importlib.import_module(COMMANDS["bench"].module).__name__ == "ssmkit.benchmarks.cli"
    assert main(["bench", "no_such"]) == 2
    assert "no benchmark is called 'no_such'" in capsys.readouterr().err
