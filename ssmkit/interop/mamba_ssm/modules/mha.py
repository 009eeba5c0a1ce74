"""`ssmkit.nn.MHA` by its official path; it is causal unless told otherwise, and refuses to be otherwise."""

from ssmkit.nn import MHA

__all__ = ["MHA"]
