"""The official implementation's files that run without a GPU, imported on a machine that lacks its CUDA extensions."""

import importlib
import importlib.util
import sys
from types import ModuleType

from .registry import Absent


def mamba_ssm(module: str) -> ModuleType:
    """mamba_ssm's `module`.

    The package's own __init__, which imports every model, is passed over; an empty module stands for the extension.
    """
    if "mamba_ssm" not in sys.modules:
        package = importlib.util.find_spec("mamba_ssm")
        if package is None or not package.submodule_search_locations:
            raise Absent(
                "pip install --no-deps mamba-ssm (MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE without CUDA)"
            )
        bare = sys.modules["mamba_ssm"] = ModuleType("mamba_ssm")
        bare.__path__ = list(package.submodule_search_locations)
    if "selective_scan_cuda" not in sys.modules and importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    return importlib.import_module(f"mamba_ssm.{module}")
