"""`ssmkit.nn.Mamba` by its official path; states lie as that layer keeps them."""

from ssmkit.interop.mamba_ssm.modules.block import Block
from ssmkit.nn import Mamba

__all__ = ["Block", "Mamba"]
