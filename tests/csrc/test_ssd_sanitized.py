"""csrc/cpu/ssd*.cpp under the address and undefined-behaviour sanitizers (ssd.cpp beside this file)."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *CAPABILITIES["avx2"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_the_tensors(tmp_path):
    common = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
    common += ["-I", str(ROOT / "csrc"), *(f"-DSSMKIT_BUILT_{name.upper()}" for name in CAPABILITIES)]
    objects = []
    for name, flags in CAPABILITIES.items():
        for source in ("ssd.cpp", "ssd_backward.cpp"):
            objects.append(str(tmp_path / f"{name}_{source}.o"))
            options = [*flags, f"-DSSMKIT_CAPABILITY={name}", "-c", str(ROOT / "csrc/cpu" / source), "-o", objects[-1]]
            subprocess.run([*common, *options], check=True)
    program = str(tmp_path / "ssd")
    sources = [str(Path(__file__).with_name("ssd.cpp")), str(ROOT / "csrc/dispatch.cpp")]
    subprocess.run([*common, *sources, *objects, "-o", program], check=True)
    for name in CAPABILITIES:
        done = subprocess.run([program, name], capture_output=True, text=True)
        if done.returncode == 2:
            continue  # this CPU does not offer it
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr[-4000:]}"
