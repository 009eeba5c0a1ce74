"""The public names of the package causal-conv1d on `ssmkit.ops.causal_conv1d` and its step."""

from ssmkit.interop.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from ssmkit.interop.finder import version_of

__version__ = version_of("causal_conv1d")
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
