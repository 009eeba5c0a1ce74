"""`ssmkit.nn.Mamba2Simple` by its official path; states lie as that layer keeps them."""

from ssmkit.nn import Mamba2Simple

__all__ = ["Mamba2Simple"]
