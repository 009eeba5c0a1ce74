"""ssmkit: kernels, layers and backbones for state-space sequence models."""

from ssmkit import interop, ops
from ssmkit.paths import ScanPath

__version__ = "0.1.0"
__all__ = ["ScanPath", "__version__", "interop", "ops"]
