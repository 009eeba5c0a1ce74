"""Layers: parameters, projections, and a call to an op."""

from ssmkit.nn.attention import MHA
from ssmkit.nn.block import Block, MambaStack
from ssmkit.nn.mamba import Mamba
from ssmkit.nn.mamba2 import Mamba2, Mamba2Simple
from ssmkit.nn.mamba3 import Mamba3
from ssmkit.nn.mlp import GatedMLP
from ssmkit.nn.rms_norm import RMSNorm

__all__ = ["MHA", "Block", "GatedMLP", "Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "MambaStack", "RMSNorm"]
