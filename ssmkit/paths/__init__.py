"""Scan paths: the order in which a scan visits the tokens, as data.

A `ScanPath` is a permutation of the tokens plus the places where the state restarts. Kernels read row `path[p]` and
write row `path[p]`, so no tensor is ever rearranged for a scan order. The functions below make the paths of published
models; they keep what they made, so a layer may ask for its path at every forward.
"""

from ssmkit.paths.drawing import plot
from ssmkit.paths.families import Padded, atrous, clip, column, diagonals, padded, row, snake, spiral, windows
from ssmkit.paths.routes import (
    MOVES,
    concatenate,
    continuous,
    cross,
    hilbert,
    hilbert8,
    moves,
    random,
    zigzag8,
)
from ssmkit.paths.scan_path import ScanPath, Strides

__all__ = [
    "MOVES",
    "Padded",
    "ScanPath",
    "Strides",
    "atrous",
    "clip",
    "column",
    "concatenate",
    "continuous",
    "cross",
    "diagonals",
    "hilbert",
    "hilbert8",
    "moves",
    "padded",
    "plot",
    "random",
    "row",
    "snake",
    "spiral",
    "windows",
    "zigzag8",
]
