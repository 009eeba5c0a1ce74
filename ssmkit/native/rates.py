"""Rates of this machine at the capability in use: what the CPU benchmarks call the limit."""

from __future__ import annotations

import time
from collections.abc import Callable

from ssmkit.native import library


def _best_rate(run: Callable[[int, int], float], rounds: int, threads: int, repeats: int) -> float:
    """Elements per second, the best of `repeats` runs of some milliseconds."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        count = run(rounds, threads)
        best = max(best, count / (time.perf_counter() - start))
    return best


def exp2_rate(threads: int = 1, repeats: int = 40) -> float:
    """fp32 exponentials (2^x) per second by the kernels' own polynomial."""
    return _best_rate(library().run_exp2, 40_000, threads, repeats)


def fma_rate(threads: int = 1, repeats: int = 40) -> float:
    """fp32 multiply-adds per second."""
    return _best_rate(library().run_fma, 1_000_000, threads, repeats)
