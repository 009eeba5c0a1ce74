"""Ops: each file holds one op's equations, public function, reference, schema, backends and autograd."""

from ssmkit.ops.linear_scan import linear_scan
from ssmkit.ops.selective_scan import selective_scan

__all__ = ["linear_scan", "selective_scan"]
