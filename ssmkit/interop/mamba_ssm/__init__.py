"""The public names of the package mamba-ssm on ssmkit's ops and layers."""

from ssmkit.interop.finder import version_of
from ssmkit.interop.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from ssmkit.interop.mamba_ssm.modules.mamba2 import Mamba2
from ssmkit.interop.mamba_ssm.modules.mamba3 import Mamba3
from ssmkit.interop.mamba_ssm.modules.mamba_simple import Mamba
from ssmkit.interop.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

# transformers looks for these three at the top
from ssmkit.interop.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from ssmkit.interop.mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__version__ = version_of("mamba_ssm")
__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLMHeadModel",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
