"""Layers: parameters, projections, and a call to an op."""

from ssmkit.nn.attention import MHA
from ssmkit.nn.bi_attn import BiAttn
from ssmkit.nn.block import Block, MambaStack
from ssmkit.nn.dbm import DBM
from ssmkit.nn.drop_path import DropPath
from ssmkit.nn.efficient_vmamba import AtrousSS2D, EVSSBlock
from ssmkit.nn.grootl import GrootL
from ssmkit.nn.grootv import GrootVLayer, TreeSSM
from ssmkit.nn.layer_norm2d import LayerNorm2d
from ssmkit.nn.local_mamba import LocalSS2D, MultiMamba
from ssmkit.nn.mamba import Mamba
from ssmkit.nn.mamba2 import Mamba2, Mamba2Simple
from ssmkit.nn.mamba2d import Mamba2D, Mamba2DBlock
from ssmkit.nn.mamba3 import Mamba3
from ssmkit.nn.mamba_nd import MambaND, MambaNDLayer
from ssmkit.nn.mamba_yolo import YOLOSS2D, LSBlock, ODSSBlock, RGBlock, XSSBlock
from ssmkit.nn.mhs_vm import GFU, MHSM, MHSBlock, VSSGate
from ssmkit.nn.mlp import MLP, GatedMLP
from ssmkit.nn.msv_mamba import MS2D, ConvFFN, MSVSSBlock
from ssmkit.nn.patch_embed import PatchEmbed
from ssmkit.nn.plain_mamba import PlainMamba2D, PlainMambaLayer
from ssmkit.nn.rms_norm import RMSNorm
from ssmkit.nn.rope_attention import RoPEAttention2D
from ssmkit.nn.ss2d import SS2D, ForwardType
from ssmkit.nn.ssm2d import SSM2D
from ssmkit.nn.vim import BiMamba
from ssmkit.nn.vss_block import VSSBlock
from ssmkit.nn.vssd import VSSD, VSSDBlock

__all__ = [
    "DBM",
    "GFU",
    "MHA",
    "MHSM",
    "MLP",
    "MS2D",
    "SS2D",
    "SSM2D",
    "VSSD",
    "YOLOSS2D",
    "AtrousSS2D",
    "BiAttn",
    "BiMamba",
    "Block",
    "ConvFFN",
    "DropPath",
    "EVSSBlock",
    "ForwardType",
    "GatedMLP",
    "GrootL",
    "GrootVLayer",
    "LSBlock",
    "LayerNorm2d",
    "LocalSS2D",
    "MHSBlock",
    "MSVSSBlock",
    "Mamba",
    "Mamba2",
    "Mamba2D",
    "Mamba2DBlock",
    "Mamba2Simple",
    "Mamba3",
    "MambaND",
    "MambaNDLayer",
    "MambaStack",
    "MultiMamba",
    "ODSSBlock",
    "PatchEmbed",
    "PlainMamba2D",
    "PlainMambaLayer",
    "RGBlock",
    "RMSNorm",
    "RoPEAttention2D",
    "TreeSSM",
    "VSSBlock",
    "VSSDBlock",
    "VSSGate",
    "XSSBlock",
]
