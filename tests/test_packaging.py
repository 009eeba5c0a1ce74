"""What `pip install` makes of a checkout: sdist, wheel under build isolation, and an installation without a compiler."""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCAN = """
import warnings
import torch
warnings.simplefilter("ignore")
import ssmkit
from ssmkit.testing import selective_scan_inputs
from ssmkit.ops import selective_scan
import ssmkit.kernels
inputs = selective_scan_inputs(1, 9, 4, 2)
y = selective_scan(**inputs)
y.sum().backward()
print(ssmkit.__file__)
"""


def run(command, *, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def installed(wheel, folder, code, **environment):
    """What `code` prints in a process that sees the wheel and not the checkout."""
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel], cwd=folder.parent)
    out = run([sys.executable, "-c", code], cwd=folder.parent, PYTHONPATH=str(folder), **environment)
    assert str(folder) in out, out
    return out


@pytest.mark.slow
def test_sdist_and_wheel_under_build_isolation(tmp_path):
    """`python -m build` makes the sdist, then the wheel from it, in an environment that holds no torch."""
    # What matters here is that it builds, and that takes a quarter of the time unoptimised.
    run([sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT], cwd=tmp_path, CXXFLAGS="-O0")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert sdist.name.startswith("ssmkit-")
    held = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("ssmkit/native/_native.") for name in held), held
    assert "ssmkit/kernels/selective_scan.py" in held
    assert not [name for name in held if name.split("/")[0] not in ("ssmkit",) and ".dist-info/" not in name]
    code = SCAN + "assert selective_scan(**inputs, backend='cpu').shape == (1, 9, 4)"
    installed(wheel, tmp_path / "site", code, TRITON_INTERPRET="0")


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    """SSMKIT_NATIVE=0 makes a pure wheel that runs the reference and says so; without the variable the error names it."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path / "dist",
        ROOT,
    ]
    bare = {"CXX": str(tmp_path / "no-such-compiler")}
    refused = subprocess.run(build, env=os.environ | bare, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "SSMKIT_NATIVE=0" in refused.stdout + refused.stderr

    run(build, cwd=tmp_path, SSMKIT_NATIVE="0", **bare)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    installed(wheel, tmp_path / "site", SCAN, TRITON_INTERPRET="0")
    told = run(
        [sys.executable, "-W", "always", "-c", SCAN.replace('warnings.simplefilter("ignore")', "")],
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
        TRITON_INTERPRET="0",
    )
    assert "site" in told
    report = run(
        [sys.executable, "-m", "ssmkit.doctor"], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), TRITON_INTERPRET="0"
    )
    assert "the compiled library was not built" in report
    assert "reinstall" in report


@pytest.mark.skipif(os.environ.get("SSMKIT_NATIVE") == "0", reason="installed without the compiled library")
def test_the_compiled_library_loads():
    """Otherwise every test of the cpu backend would go missing in silence."""
    import ssmkit.native

    assert not ssmkit.native.why_not()


def test_doctor_names_every_backend_of_every_op():
    import ssmkit.doctor
    import ssmkit.ops

    report = ssmkit.doctor.report()
    for op in ssmkit.ops.__all__:
        backends = importlib.import_module(f"ssmkit.ops.{op}").BACKENDS
        for name in {row.name for row in backends} | {"reference"}:
            assert any(line.split()[:2] == [op, name] for line in report.splitlines()), (op, name)
