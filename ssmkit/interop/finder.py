"""Let `import mamba_ssm` and `import causal_conv1d` find ssmkit's modules of these names."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = "ssmkit.interop"
# Names served and the versions whose signatures they follow.
VERSIONS = {"mamba_ssm": "2.3.2.post1", "causal_conv1d": "1.6.1"}


def version_of(name: str) -> str:
    """The version that a served package reports: that of the signatures, marked as ssmkit's."""
    from ssmkit import __version__

    return f"{VERSIONS[name]}+ssmkit.{__version__}"


class _Metadata(Distribution):
    """What importlib.metadata says of a served package."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            name = self._name.replace("_", "-")
            return (
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version_of(self._name)}\nSummary: served by ssmkit\n"
            )
        return self._name if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(MetaPathFinder, Loader):
    """Answers for the names in `names` and all below them."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.displaced: dict[str, ModuleType] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] not in self.names:
            return None
        own = importlib.util.find_spec(f"{HOME}.{fullname}")
        if own is None:
            return None
        is_package = own.submodule_search_locations is not None
        return ModuleSpec(fullname, self, origin=own.origin, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # One module under two names: its classes are the same whichever name they are imported by.
        sys.modules[module.__name__] = importlib.import_module(f"{HOME}.{module.__name__}")

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()) -> Iterator[Any]:  # noqa: B008
        wanted = None if context.name is None else re.sub(r"[-_.]+", "_", context.name).lower()
        return iter([_Metadata(name) for name in sorted(self.names) if wanted in (None, name)])


_FINDER = _Finder()


class Served(tuple[str, ...]):
    """The names that are served; as a context manager it takes away again what the call that made it added."""

    _undo: Callable[[], None]

    def __new__(cls, names: Iterable[str], undo: Callable[[], None]) -> "Served":
        """Names, and what leaving the context does."""
        self = super().__new__(cls, names)
        self._undo = undo
        return self

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()


def install(*, force: bool = False) -> Served:
    """Serve `mamba_ssm` and `causal_conv1d` where they are absent, so that code written for them runs as it is.

    Import statements, importlib.util.find_spec and importlib.metadata.version then find ssmkit's modules; the versions
    carry the suffix +ssmkit. Code that asks for a CUDA device besides, as transformers does, still finds none on a CPU:
    for it there is `ssmkit.interop.transformers.use_kernels`. Calling twice changes nothing.

        ssmkit.interop.install()                      for the rest of the process
        with ssmkit.interop.install(): ...            for a while

    Args:
        force: Also serve a name whose package is installed, or even imported. Objects imported before stay what they were.
    Returns:
        The names that are served now; a name that is missing belongs to an installed package.
    """
    added = []
    for name in VERSIONS:
        if name in _FINDER.names or (not force and _is_there(name)):
            continue
        for loaded in _loaded(name):
            _FINDER.displaced[loaded] = sys.modules.pop(loaded)
        _FINDER.names.add(name)
        added.append(name)
    if _FINDER.names and _FINDER not in sys.meta_path:
        # First, since the folder of a served package would otherwise be searched for its submodules.
        sys.meta_path.insert(0, _FINDER)
    importlib.invalidate_caches()
    # `uninstall()` without names takes all away
    return Served(sorted(_FINDER.names), lambda: uninstall(*added) if added else None)


def uninstall(*names: str) -> None:
    """Stop serving these names, by default all; packages that `force` displaced are back."""
    for name in names or tuple(VERSIONS):
        if name not in VERSIONS:
            raise ValueError(f"name must be one of {', '.join(VERSIONS)}, got {name!r}")
        if name not in _FINDER.names:
            continue
        _FINDER.names.remove(name)
        for loaded in _loaded(name):
            del sys.modules[loaded]
        for loaded in [key for key in _FINDER.displaced if key.partition(".")[0] == name]:
            sys.modules[loaded] = _FINDER.displaced.pop(loaded)
    if not _FINDER.names and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    importlib.invalidate_caches()


def _is_there(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _loaded(name: str) -> list[str]:
    return [key for key in sys.modules if key == name or key.startswith(f"{name}.")]
