"""`ssmkit.nn.Mamba2` by its official path; states lie as that layer keeps them."""

from ssmkit.nn import Mamba2

__all__ = ["Mamba2"]
