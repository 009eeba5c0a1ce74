"""The house: one op, one name, everywhere; imports run downwards only; no Torch header under csrc."""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import ssmkit
import ssmkit.ops

ROOT = Path(__file__).parents[1]
# A module may import those below it and its own level, never those above.
LEVELS = [
    {"cli"},
    {"train", "doctor", "demo"},
    {"data"},
    {"interop"},
    {"models"},
    {"nn"},
    {"ops", "testing"},
    {"native", "kernels", "backends", "paths"},
]


@pytest.mark.parametrize("op", ssmkit.ops.__all__)
def test_every_op_has_its_files(op):
    # what runs on a well-kept library alone has no kernels of its own
    own = any(row.module.startswith("ssmkit.") for row in import_module(f"ssmkit.ops.{op}").BACKENDS)
    for path in (f"ssmkit/ops/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"):
        assert (ROOT / path).is_file(), f"{op} has no {path}"
    for path in (f"kernels/{op}.py", f"csrc/cpu/{op}.cpp", f"ssmkit/native/{op}.py") if own else ():
        assert (ROOT / path).is_file(), f"{op} has no {path}"


def imported(path):
    """Absolute names of the modules that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Relative imports reach no further than the folder itself.
            assert node.level <= 1, f"{path}: relative import from above"
            if node.level == 0:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level_of(part):
    return next((level for level, parts in enumerate(LEVELS) if part in parts), None)


def files():
    return [path for path in sorted((ROOT / "ssmkit").rglob("*.py")) if path != ROOT / "ssmkit/__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = path.relative_to(ROOT / "ssmkit").parts[0].removesuffix(".py")
    assert level_of(own) is not None, f"ssmkit/{own} has no level in this test"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "ssmkit" and len(parts) > 1 and level_of(parts[1]) is not None:
            assert level_of(parts[1]) >= level_of(own), f"{path.relative_to(ROOT)} imports {name}, which lies above it"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_else_of_ssmkit(path):
    above = [
        name for name in imported(path) if name.split(".")[0] == "ssmkit" and not name.startswith("ssmkit.kernels")
    ]
    assert not above


def test_csrc_includes_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    assert sources
    for path in sources:
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert not any(word in line for word in ("torch", "ATen", "c10")), f"{path}: {line}"


def test_the_version_is_that_of_the_package():
    assert version("ssmkit") == ssmkit.__version__
