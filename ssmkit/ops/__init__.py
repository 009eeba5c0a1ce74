"""Ops: each file holds one op's equations, public function, reference, schema, backends and autograd."""

from ssmkit.ops.causal_conv1d import causal_conv1d
from ssmkit.ops.causal_conv1d_step import causal_conv1d_step
from ssmkit.ops.cross_selective_scan import cross_selective_scan
from ssmkit.ops.grid_scan import grid_scan
from ssmkit.ops.linear_scan import linear_scan
from ssmkit.ops.linear_step import linear_step
from ssmkit.ops.long_conv import long_conv
from ssmkit.ops.minimum_spanning_tree import minimum_spanning_tree
from ssmkit.ops.rms_norm import rms_norm
from ssmkit.ops.selective_scan import selective_scan
from ssmkit.ops.selective_state_step import selective_state_step
from ssmkit.ops.ssd import ssd
from ssmkit.ops.ssd_noncausal import ssd_noncausal
from ssmkit.ops.ssd_step import ssd_step
from ssmkit.ops.ssm2d_kernel import ssm2d_kernel
from ssmkit.ops.tree_scan import tree_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_selective_scan",
    "grid_scan",
    "linear_scan",
    "linear_step",
    "long_conv",
    "minimum_spanning_tree",
    "rms_norm",
    "selective_scan",
    "selective_state_step",
    "ssd",
    "ssd_noncausal",
    "ssd_step",
    "ssm2d_kernel",
    "tree_scan",
]
