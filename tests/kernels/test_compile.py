"""Every kernel that ships compiles ahead of time within its limits: registers, no local memory, shared memory.

For one target of each vendor, or for all of them with SSMKIT_TARGETS=all (`make targets`).
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

# bytes of shared memory per block: consumer NVIDIA cards have 99 KB, AMD's CDNA3 64 KB
SHARED_LIMIT = {**dict.fromkeys(["cuda:80", "cuda:90", "cuda:100", "cuda:120"], 99 << 10), "hip:gfx942": 64 << 10}

TARGETS = list(SHARED_LIMIT) if os.environ.get("SSMKIT_TARGETS") == "all" else ["cuda:90", "hip:gfx942"]

KERNELS = {
    name
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}


def compile_for(target: str) -> list[dict]:
    """The report of tests/kernels/aot.py, made in a process of its own: this one may interpret kernels instead."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("aot.py"))
    done = subprocess.run([sys.executable, script, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{target}: compiling failed\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_fit_their_targets(record_property):
    """As many targets at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(TARGETS, pool.map(compile_for, TARGETS), strict=True))
    for target, report in reports.items():
        missing = KERNELS - {row["kernel"] for row in report}
        assert not missing, f"in no shipped_configurations(): {', '.join(sorted(missing))}"
        for row in report:
            record_property(f"{target} {row['kernel']} {row['configuration']}", f"{row['registers']} registers")
    excess = [
        row
        for target, report in reports.items()
        for row in report
        if row["local_bytes"] or row["spills"] or row["shared_bytes"] > SHARED_LIMIT[target]
    ]
    assert not excess, "\n".join(map(str, excess))
