"""`ssmkit.nn.Mamba3` by its official path; states lie as that layer keeps them."""

from ssmkit.nn import Mamba3

__all__ = ["Mamba3"]
