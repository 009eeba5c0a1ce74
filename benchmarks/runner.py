"""Runs a benchmark: each cell (shape, dtype, mode, threads) checked, then timed pair by pair against each rival."""

import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from . import machine, timing
from .candidate import OURS, REFERENCE, Spec
from .registry import MODULES, Bench, find
from .timing import Pair, Summary
from .worker import ALLOCATORS, Unmeasured, Worker

SCHEMA = 1
# The worker of our op's variants, beside the worker of the op itself.
VARIANT = "variant"


class Process(Protocol):
    """What the runner needs of a worker."""

    def ask(self, command: str, timeout: float = ..., **arguments: Any) -> Any:
        """Carry out a command of `worker.Server`."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, as the command line says it.

    Args:
        capabilities: SIMD levels; the first is the one compared with the rivals, the others with the first.
        exclusive: Keep other programs off the CPUs in use during windows.
        budget: Seconds after which a call is not repeated: its one run is reported as such.
    """

    bench: str
    modes: tuple[str, ...] = ("fwd",)
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    device: str = "cpu"
    backend: str = "auto"
    capabilities: tuple[str, ...] = ("auto",)
    allocator: str = "no mmap"
    shapes: tuple[str, ...] = ()
    rivals: tuple[str, ...] | None = None
    rounds: int = 7
    window: float = timing.WINDOW_S
    budget: float = 10.0
    patience: int = 3
    exclusive: bool = False

    def __post_init__(self) -> None:
        if self.allocator not in ALLOCATORS:
            raise ValueError(f"allocator must be one of {', '.join(ALLOCATORS)}; got {self.allocator!r}")
        for mode in self.modes:
            if mode not in ("fwd", "fwdbwd"):
                raise ValueError(f"mode must be fwd or fwdbwd, got {mode!r}")


@dataclass(frozen=True)
class Variant:
    """Our own op run another way, compared with the cell's first: another capability, dtype, thread count or mode."""

    label: str
    spec: Spec
    environment: tuple[tuple[str, str], ...]


@dataclass
class Runner:
    """Runs a plan cell by cell; `start` makes a worker for an environment, `say` tells of progress."""

    plan: Plan
    start: Callable[[Mapping[str, str]], Process] = Worker
    say: Callable[[str], None] = print
    workers: dict[tuple[str, tuple[tuple[str, str], ...]], Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bench: Bench = find(self.plan.bench)
        known = [label for label, _ in self.bench.cases()]
        for part in self.plan.shapes:
            if not any(part in label for label in known):
                raise ValueError(f"no shape of {self.bench.name} is called {part!r}; there are: {'; '.join(known)}")
        for name in self.plan.rivals or ():
            if name not in self.bench.rivals:
                raise ValueError(f"{self.bench.name} has no rival {name!r}; there are: {', '.join(self.bench.rivals)}")

    def run(self, keep: Callable[[dict[str, Any]], None] = lambda results: None) -> dict[str, Any]:
        """All cells, with what a reader needs to place them; `keep` gets what there is after each cell."""
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "bench": self.bench.name,
            "plan": asdict(self.plan),
            "machine": machine.describe(self.plan.device),
            "folder": machine.folder_name(self.plan.device),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "cells": [],
        }
        try:
            for cell in self._cells():
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                results["cells"].append({**cell, "commit": results["commit"], "date": now})
                keep(results)
        finally:
            for process in self.workers.values():
                process.close()
            self.workers.clear()
        return results

    def _cells(self) -> Iterator[dict[str, Any]]:
        plan = self.plan
        for label, sizes in self.bench.cases():
            if plan.shapes and not any(part in label for part in plan.shapes):
                continue
            for dtype in plan.dtypes:
                for mode in plan.modes:
                    if mode not in self.bench.modes:
                        continue
                    base = Spec(
                        module=MODULES[self.bench.name], bench=self.bench.name, sizes=sizes, dtype=dtype, mode=mode,
                        device=plan.device, backend=plan.backend,
                    )  # fmt: skip
                    with tempfile.TemporaryDirectory(prefix="ssmkit-bench-") as scratch:
                        expected = self._expect(base, Path(scratch))
                        for threads in plan.threads:
                            yield self._cell(label, replace(base, threads=threads), expected)

    def _worker(self, name: str, environment: tuple[tuple[str, str], ...]) -> Process:
        key = (name, environment)
        if key not in self.workers:
            self.workers[key] = self.start({**ALLOCATORS[self.plan.allocator], **dict(environment)})
        return self.workers[key]

    def _drop(self, name: str, environment: tuple[tuple[str, str], ...]) -> None:
        process = self.workers.pop((name, environment), None)
        if process is not None:
            process.close()

    def _expect(self, base: Spec, scratch: Path) -> dict[tuple[str, str], Path]:
        """Write what the reference gives for this shape and dtype; in forward mode too, for variants of that mode.

        A mode it cannot do (it ran out of memory) is left out: its cells then fail for want of the file.
        """
        paths = {}
        for mode in {base.mode, "fwd"}:
            paths[base.dtype, mode] = path = scratch / f"{base.dtype}-{mode}.pt"
            process = self.start(ALLOCATORS["default"])
            try:
                process.ask(
                    "ready", **asdict(replace(base, candidate=REFERENCE, mode=mode, threads=max(self.plan.threads)))
                )
                process.ask("save_expected", path=str(path))
            except Unmeasured as reason:
                self.say(f"  {REFERENCE}: {reason.status}: {reason}")
            finally:
                process.close()
        return paths

    def _environment(self, capability: str) -> tuple[tuple[str, str], ...]:
        return () if capability == "auto" else (("SSMKIT_CPU_CAPABILITY", capability),)

    def _cell(self, label: str, spec: Spec, expected: dict[tuple[str, str], Path]) -> dict[str, Any]:
        """Check and time our op, then every variant and rival against it."""
        capability = self.plan.capabilities[0]
        cell: dict[str, Any] = {
            "shape": label, "sizes": spec.sizes, "dtype": spec.dtype, "mode": spec.mode, "threads": spec.threads,
            "capability": machine.capability() if capability == "auto" else capability,
            "allocator": self.plan.allocator, "exclusive": self.plan.exclusive,
            "cost": self.bench.cost(spec.sizes, spec.torch_dtype, spec.mode), "rows": [],
        }  # fmt: skip
        self.say(f"{label}: {spec.dtype} {spec.mode}, {spec.threads} thread{'s' * (spec.threads > 1)}")
        ours: dict[str, Any] = {"name": OURS}
        cell["rows"].append(ours)
        environment = self._environment(capability)
        try:
            base = self._worker(OURS, environment)
            base.ask("ready", **asdict(spec))
            ours.update(base.ask("check", path=str(expected[spec.dtype, spec.mode])))
            rounds = self._against_limit(cell, base, spec) + self._against_all(cell, base, spec, expected)
            ours.update(
                status="ok",
                time=Summary.of([pair.base for pair in rounds]).plain(),
                load=load_of(rounds),
                memory=base.ask("peak_memory"),
            )
            base.ask("release")
            self.say(f"  {OURS}: {1e3 * ours['time']['median']:.3g} ms")
        except Unmeasured as reason:
            ours.update(status=reason.status, reason=str(reason))
            self.say(f"  {OURS}: {reason.status}: {reason}")
            self._drop(OURS, environment)
        return cell

    def _against_all(
        self, cell: dict[str, Any], base: Process, spec: Spec, expected: dict[tuple[str, str], Path]
    ) -> list[Pair]:
        """Fill the cell's rows of variants and rivals; all pairs."""
        plan = self.plan
        rounds: list[Pair] = []
        for variant in self._variants(spec):
            row, pairs = self._against(base, variant.label, variant.spec, variant.environment, expected)
            cell["rows"].append({**row, "variant": True})
            rounds += pairs
        for name in self.bench.rivals_on(plan.device) if plan.rivals is None else plan.rivals:
            rival = replace(spec, candidate=name, backend="auto")
            row, pairs = self._against(base, name, rival, (), expected)
            note = self.bench.rival(name).note
            cell["rows"].append({**row, **({"note": note} if note else {})})
            rounds += pairs
        return rounds

    def _against_limit(self, cell: dict[str, Any], base: Process, spec: Spec) -> list[Pair]:
        """Our op beside the machine's best rates, round by round."""
        rates: list[dict[str, float]] = []

        def limits(calls: int) -> dict[str, float]:
            answer = base.ask("limits", threads=spec.threads, alone=self.plan.exclusive)
            rates.append(answer.pop("rates"))
            return answer

        plan = self.plan
        ours = window_of(base, plan.exclusive)
        calls = timing.calibrate(ours, plan.window)
        every = timing.rounds_until_quiet(ours, calls, limits, 1, rounds=plan.rounds, patience=plan.patience)
        counted = timing.chosen(every, plan.rounds)
        pairs, rates = [every[i] for i in counted], [rates[i] for i in counted]
        cell["rates"] = {kind: Summary.of([rate[kind] for rate in rates]).plain() for kind in rates[0]}
        bounds = (machine.seconds_at_best(cell["cost"], rate) for rate in rates)
        known = [(bound, pair) for bound, pair in zip(bounds, pairs, strict=True) if bound is not None]
        if known:
            cell["limit"] = {
                "seconds": Summary.of([bound.seconds for bound, _ in known]).plain(),
                "binding": known[-1][0].binding,
                "share": Summary.of([bound.seconds / pair.base for bound, pair in known]).plain(),
            }
        return pairs

    def _variants(self, spec: Spec) -> Iterator[Variant]:
        """What one run can tell of our own op besides: scaling, capabilities, dtypes, the share of backward."""
        plan = self.plan
        first = self._environment(plan.capabilities[0])
        for capability in plan.capabilities[1:]:
            yield Variant(f"{OURS}, {capability}", spec, self._environment(capability))
        if spec.threads > min(plan.threads):
            fewer = min(plan.threads)
            yield Variant(f"{OURS}, {fewer} thread{'s' * (fewer > 1)}", replace(spec, threads=fewer), first)
        if spec.dtype != plan.dtypes[0]:
            yield Variant(f"{OURS}, {plan.dtypes[0]}", replace(spec, dtype=plan.dtypes[0]), first)
        if spec.mode == "fwdbwd":
            yield Variant(f"{OURS}, fwd alone", replace(spec, mode="fwd"), first)

    def _against(
        self,
        base: Process,
        name: str,
        spec: Spec,
        environment: tuple[tuple[str, str], ...],
        expected: dict[tuple[str, str], Path],
    ) -> tuple[dict[str, Any], list[Pair]]:
        """Check another candidate and time it in pairs with ours; its row of the cell, and the pairs."""
        row: dict[str, Any] = {"name": name}
        key = VARIANT if spec.candidate == OURS else name
        try:
            other = self._worker(key, environment)
            other.ask("ready", **asdict(spec))
            path = expected.get((spec.dtype, spec.mode))
            # The first dtype was checked in its own cell, of which this one is a variant.
            row.update(other.ask("check", path=str(path)) if path is not None else {})
            pairs = self._rounds(base, other)
            row.update(
                status="ok",
                time=Summary.of([pair.other for pair in pairs]).plain(),
                ratio=Summary.of([pair.other / pair.base for pair in pairs]).plain(),
                load=load_of(pairs),
            )
            if pairs[0].other > self.plan.budget:
                row["once"] = True
            elif spec.candidate != OURS:
                row["memory"] = other.ask("peak_memory")
            other.ask("release")
        except Unmeasured as reason:
            row.update(status=reason.status, reason=str(reason))
            self.say(f"  {name}: {reason.status}: {reason}")
            if reason.status == "failed":
                self._drop(key, environment)
            else:
                with suppress(Unmeasured):
                    self._worker(key, environment).ask("release")
            return row, []
        self.say(f"  {name}: {1e3 * row['time']['median']:.4g} ms, {row['ratio']['median']:.3g} times ours")
        return row, pairs

    def _rounds(self, base: Process, other: Process) -> list[Pair]:
        """Pairs of windows; a single one where the other's call exceeds the time budget."""
        plan = self.plan
        ours, theirs = window_of(base, plan.exclusive), window_of(other, plan.exclusive)
        calls = timing.calibrate(ours, plan.window)
        first = timing.one_round(ours, calls, theirs, 1)
        if first.other > plan.budget:
            return [first]
        return timing.paired_rounds(
            ours, calls, theirs, timing.calibrate(theirs, plan.window), rounds=plan.rounds, patience=plan.patience
        )


def window_of(process: Process, alone: bool) -> timing.Timed:
    """A worker's windows, as the timing takes them."""

    def window(calls: int) -> dict[str, float]:
        return process.ask("window", calls=calls, alone=alone)

    return window


def load_of(pairs: list[Pair]) -> dict[str, Any]:
    """How quiet the machine was during the pairs that count."""
    return {
        "foreign_cores": Summary.of([pair.foreign for pair in pairs]).plain(),
        "waited_share": Summary.of([pair.waited for pair in pairs]).plain(),
        "quiet": all(pair.quiet for pair in pairs),
    }
