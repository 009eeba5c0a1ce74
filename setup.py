"""Builds ssmkit.native._native: csrc/ compiled with ninja, no Torch header, one binary for every torch version.

Every file of csrc/cpu is compiled once per CPU capability (the rows of `CAPABILITIES` for this machine's architecture)
and the binary picks among them when it is loaded. Metadata and packages stand in pyproject.toml.

    SSMKIT_NATIVE=0   install without the compiled library
    CXX               the compiler (GCC or Clang; otherwise the first of g++, c++, clang++ that is found)
    CXXFLAGS, LDFLAGS are appended to the commands
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# name -> flags. The baseline comes first: where two objects define the same weak symbol the linker keeps the first,
# so code shared through an inline function is never code that needs AVX.
CAPABILITIES: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]
    CAPABILITIES["avx512_bf16"] = [*CAPABILITIES["avx512"], "-mavx512bf16", "-DSSMKIT_BF16"]
# what has products in bfloat16, a variant of their own; all else runs as avx512
BF16_SOURCES = ("ssd.cpp", "ssd_backward.cpp")

NO_COMPILER = (
    "ssmkit: no C++17 compiler with GCC's options was found (tried {tried}). Install g++ or clang++, or name one in CXX; "
    "or set SSMKIT_NATIVE=0 to install without the compiled CPU kernels (Triton and the PyTorch reference still work)."
)


def wanted() -> bool:
    """Whether to compile at all: SSMKIT_NATIVE=0 says no."""
    value = os.environ.get("SSMKIT_NATIVE", "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"SSMKIT_NATIVE must be 0, 1 or auto, got {value!r}")
    return value != "0"


def compiles(compiler: list[str], flags: list[str], source: str = "int main() { return 0; }") -> bool:
    """Whether the compiler turns `source` into a program with these flags."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "probe.cpp")
        file.write_text(source)
        command = [*compiler, *flags, str(file), "-o", str(Path(scratch, "probe"))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def find_compiler() -> list[str]:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]) and compiles(candidate, ["-std=c++17", "-Wall"]):
            return candidate
    raise SystemExit(NO_COMPILER.format(tried=", ".join(shlex.join(candidate) for candidate in candidates)))


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR

        bundled = shutil.which("ninja", path=BIN_DIR)
    except ImportError:
        bundled = None
    found = bundled or shutil.which("ninja")
    if found is None:
        raise SystemExit("ssmkit: ninja was not found; `pip install ninja`, or set SSMKIT_NATIVE=0 to skip compiling")
    return found


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path) -> str:
    """build.ninja: every csrc/cpu file per capability, every other file once, one shared library."""
    import pybind11

    compiler = find_compiler()
    include = [CSRC, pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    openmp = ["-fopenmp"] if compiles(compiler, ["-fopenmp"], "#include <omp.h>\nint main() {}") else []
    capabilities = {name: flags for name, flags in CAPABILITIES.items() if compiles(compiler, flags)}

    common = [
        "-std=c++17",
        "-O3",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        *openmp,
    ]
    common += [f"-DSSMKIT_BUILT_{name.upper()}" for name in capabilities]
    common += [option for path in dict.fromkeys(map(str, include)) for option in ("-I", path)]
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link = [*shared, *openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(common)}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  description = $in $extra",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in -o $out {shlex.join(link)}",
        "  description = link $out",
    ]
    objects = []

    def compile_into(name: str, source: Path, flags: list[str]) -> None:
        out = f"{name}/{source.relative_to(CSRC).with_suffix('.o')}"
        objects.append(out)
        lines.extend([f"build {escape(out)}: compile {escape(source)}", f"  extra = {shlex.join(flags)}"])

    for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("bindings/*.cpp")]):
        compile_into("once", source, [])
    for name, flags in capabilities.items():
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if name == "avx512_bf16" and source.name not in BF16_SOURCES:
                continue
            compile_into(name, source, [*flags, f"-DSSMKIT_CAPABILITY={name}"])
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """build_ext whose one extension is made by ninja, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        import fcntl  # not on Windows, where only SSMKIT_NATIVE=0 installs

        with open(folder / "lock", "w") as lock:
            # two installs from one checkout take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.compile(folder, target)

    def compile(self, folder: Path, target: Path) -> None:
        library = folder / target.name
        recipe = ninja_file(library)
        if not (folder / "build.ninja").is_file() or (folder / "build.ninja").read_text() != recipe:
            (folder / "build.ninja").write_text(recipe)
        command = [find_ninja(), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(
                "ssmkit: compiling csrc/ failed (see the compiler's message above). "
                "SSMKIT_NATIVE=0 installs without the compiled CPU kernels."
            )
        # under a new inode: a process that has the old library mapped keeps it whole
        staged = target.with_suffix(".new")
        shutil.copy2(library, staged)
        os.replace(staged, target)


setup(
    packages=[*find_packages(include=["ssmkit", "ssmkit.*"]), "ssmkit.kernels", "ssmkit.benchmarks"],
    package_dir={"ssmkit": "ssmkit", "ssmkit.kernels": "kernels", "ssmkit.benchmarks": "benchmarks"},
    ext_modules=[Extension("ssmkit.native._native", sources=[])] if wanted() else [],
    cmdclass={"build_ext": NinjaBuild},
)
