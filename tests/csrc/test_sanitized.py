"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, against naive loops, without Python.

Every file here that includes harness.h tests the op it is named after: its kernels are csrc/cpu/<op>*.cpp, and those of
the ops whose headers its own header includes.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPS = sorted(path.stem for path in HERE.glob("*.cpp") if path.stem != "driver" and '"harness.h"' in path.read_text())
CAPABILITIES = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *CAPABILITIES["avx2"]]
    CAPABILITIES["avx512_bf16"] = [*CAPABILITIES["avx512"], "-mavx512bf16", "-DSSMKIT_BF16"]
# unoptimised: a quarter of the time to compile, and no check is folded away
SANITIZE = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str | None:
    """A compiler that can link the sanitizers."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            probe = subprocess.run(
                [name, "-x", "c++", *SANITIZE, "-o", os.devnull, "-"],
                input="int main() {}",
                text=True,
                capture_output=True,
            )
            if probe.returncode == 0:
                return name
    return None


@pytest.fixture(scope="module")
def cxx() -> str:
    found = compiler()
    if found is None:
        pytest.skip("needs a compiler with -fsanitize=address,undefined")
    return found


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> Path:
    """A folder of compiled files for all tests, and all workers of pytest-xdist: several ops use the same kernels."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sanitized"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(command: list[str], source: Path, flags: list[str], folder: Path) -> str:
    """The object of a source under these flags, made by whoever comes first."""
    import fcntl

    stem = hashlib.sha256(" ".join([*command, str(source), *flags]).encode()).hexdigest()[:16]
    made, partial_file = folder / f"{stem}.o", folder / f"{stem}.partial.o"
    with open(folder / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            subprocess.run([*command, *flags, "-c", str(source), "-o", str(partial_file)], check=True)
            partial_file.rename(made)
    return str(made)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_stay_within_their_tensors(op, cxx, objects, tmp_path):
    in_bf16 = "SSMKIT_CPU_BF16_ENTRY" in (ROOT / f"csrc/cpu/{op}.h").read_text()
    capabilities = {name: flags for name, flags in CAPABILITIES.items() if in_bf16 or name != "avx512_bf16"}
    common = [cxx, "-std=c++17", *SANITIZE, "-fopenmp", "-I", str(ROOT / "csrc"), "-I", str(HERE)]
    built = [f"-DSSMKIT_BUILT_{name.upper()}" for name in capabilities]
    units = [(source, built) for source in (HERE / "driver.cpp", HERE / f"{op}.cpp", ROOT / "csrc/dispatch.cpp")]
    header = (ROOT / f"csrc/cpu/{op}.h").read_text()
    used = [op, *(other for other in OPS if f'"cpu/{other}.h"' in header)]
    for source in sorted({path for name in used for path in (ROOT / "csrc/cpu").glob(f"{name}*.cpp")}):
        units += [(source, [*flags, f"-DSSMKIT_CAPABILITY={name}"]) for name, flags in capabilities.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        linked = list(pool.map(lambda unit: compiled(common, *unit, objects), units))
    program = str(tmp_path / op)
    subprocess.run([*common, *linked, "-o", program], check=True)

    # libgomp keeps its thread pool until the end, which the leak checker would report
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = []
    for name in capabilities:
        done = subprocess.run([program, name], capture_output=True, text=True, env=environment)
        if done.returncode != 2:
            ran.append(name)
            assert done.returncode == 0, f"{name}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "baseline" in ran


def test_no_symbol_is_shared_between_capabilities():
    """A weak symbol of one variant may serve another after linking: wide instructions on a CPU without them.

    DW.ref.* hold an address, no instructions.
    """
    objects = [path for path in ROOT.glob("build/native-*/*/cpu/*.o") if path.parts[-3] != "baseline"]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs nm and the objects of a build in this checkout")
    shared = {}
    for path in objects:
        lines = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout.splitlines()
        weak = [line for line in lines if line[17:18] in ("W", "V", "u") and "DW.ref." not in line]
        if weak:
            shared[path.name] = weak
    assert not shared
