"""Benchmarks of every op and model against its rivals and against what the machine could do at best.

    python -m benchmarks selective_scan --mode fwd,fwdbwd --json out.json --plot out.png
    ssmkit bench selective_scan --threads 1,2

One file per subject, `bench_<name>.py`, states what is compared; `Bench` says how. The runner owns the rest: nothing
is timed before it has matched the float64 reference, every candidate runs in a process of its own, and every ratio
comes from windows that alternate (A B A B).
"""

from .registry import Absent, Bench, Prepared, Rival, compiled_anew, register, sizes_of

__all__ = ["Absent", "Bench", "Prepared", "Rival", "compiled_anew", "register", "sizes_of"]
