"""Ops: each file holds one op's equations, public function, reference, schema, backends and autograd."""

from ssmkit.ops.selective_scan import selective_scan

__all__ = ["selective_scan"]
