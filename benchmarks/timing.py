"""Paired timing on a machine that others use too.

Windows of the two sides alternate (A B A B), and a ratio is taken within each pair, so that drift of the clock, of the
host and of the memory cancels. pytest-benchmark times one function after another, which pairs nothing; what it does
well, medians and quartiles of rounds, is done here likewise.

A pair counts only if other programs were quiet meanwhile: their CPU time, from /proc/stat less our own, and the time
that our threads were ready to run but waited for a CPU. Pairs are chosen by that load, never by their time.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

# /proc/stat counts in ticks of 10 ms, so a pair of windows of half a second resolves 0.02 to 0.04 cores.
WINDOW_S = 0.25
FOREIGN_CORES = 0.10
WAITED_SHARE = 0.03
# Between windows: idle OpenMP threads spin for a few milliseconds before they sleep.
SETTLE_S = 0.01


class Timed(Protocol):
    """One side of a pair: runs `calls` calls, returns seconds of wall, its own cpu, waited for a cpu, and all busy cpus."""

    def __call__(self, calls: int) -> dict[str, float]:
        """Run that many calls."""


@dataclass(frozen=True)
class Pair:
    """One round: seconds per call of both sides, cores that other programs used, share of the time spent waiting."""

    base: float
    other: float
    foreign: float
    waited: float

    @property
    def quiet(self) -> bool:
        """Whether other programs let us be."""
        return self.foreign <= FOREIGN_CORES and self.waited <= WAITED_SHARE


@dataclass(frozen=True)
class Summary:
    """Order statistics of some rounds."""

    median: float
    q1: float
    q3: float
    lowest: float
    highest: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Those of at least one value."""
        ordered = sorted(values)
        return cls(
            statistics.median(ordered), _quantile(ordered, 0.25), _quantile(ordered, 0.75),
            ordered[0], ordered[-1], len(ordered),
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """As a dict, for JSON."""
        return asdict(self)


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low, rest = int(position), position % 1
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - rest) + ordered[high] * rest


def calls_for(seconds_per_call: float, window: float = WINDOW_S) -> int:
    """How many calls fill a window."""
    return max(1, math.ceil(window / max(seconds_per_call, 1e-7)))


def calibrate(side: Timed, window: float = WINDOW_S) -> int:
    """How many calls of this side fill a window, from growing trials that also warm it up."""
    calls = 1
    while True:
        per_call = side(calls)["wall"] / calls
        enough = calls_for(per_call, window)
        if calls >= enough / 4:
            return enough
        calls = min(enough, calls * 8)


def rounds_until_quiet(
    base: Timed,
    base_calls: int,
    other: Timed,
    other_calls: int,
    *,
    rounds: int,
    patience: int = 3,
    pause: Callable[[float], None] = time.sleep,
) -> list[Pair]:
    """Alternate windows of both sides until `rounds` quiet pairs are had, at most `patience * rounds` pairs; all of them."""
    pairs: list[Pair] = []
    while sum(pair.quiet for pair in pairs) < rounds and len(pairs) < patience * rounds:
        pairs.append(one_round(base, base_calls, other, other_calls, pause))
        if not pairs[-1].quiet:
            pause(0.2)
    return pairs


def chosen(pairs: Sequence[Pair], rounds: int) -> list[int]:
    """Which pairs count: the quiet ones, or if they are fewer than `rounds`, that many under the least load."""
    quiet = [i for i, pair in enumerate(pairs) if pair.quiet]
    if len(quiet) >= rounds:
        return quiet
    return sorted(sorted(range(len(pairs)), key=lambda i: (pairs[i].foreign, pairs[i].waited))[:rounds])


def paired_rounds(
    base: Timed, base_calls: int, other: Timed, other_calls: int, *, rounds: int, **options: Any
) -> list[Pair]:
    """The pairs that count of `rounds_until_quiet`."""
    pairs = rounds_until_quiet(base, base_calls, other, other_calls, rounds=rounds, **options)
    return [pairs[i] for i in chosen(pairs, rounds)]


def one_round(
    base: Timed, base_calls: int, other: Timed, other_calls: int, pause: Callable[[float], None] = time.sleep
) -> Pair:
    """One window of each side, each after a pause and an untimed call where a call is short."""
    windows = []
    for side, calls in ((base, base_calls), (other, other_calls)):
        pause(SETTLE_S)
        if calls > 2:
            side(1)
        windows.append(side(calls))
    wall, cpu, waited, busy = (sum(window[kind] for window in windows) for kind in ("wall", "cpu", "waited", "busy"))
    foreign = max(0.0, (busy - cpu) / wall)
    return Pair(windows[0]["wall"] / base_calls, windows[1]["wall"] / other_calls, foreign, waited / wall)
