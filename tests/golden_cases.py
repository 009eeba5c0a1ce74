"""Numbers of the official implementations (tests/golden), read as tensors.

Each case is NAME.npz with arrays named in.*, param.*, out.*, cot.* (weights of the outputs in the differentiated sum),
grad.in.* and grad.param.*, and NAME.json with its source and arguments.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One case; the prefixes are stripped from the names."""

    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    outputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    gradients: dict[str, Tensor]


def load(name: str) -> Golden:
    """The case of this name."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    meta = json.loads((FOLDER / f"{name}.json").read_text())
    return Golden(meta, part("in."), part("param."), part("out."), part("cot."), part("grad."))


def names(pattern: str) -> list[str]:
    """The cases whose names match a glob pattern, sorted; an empty list is an error."""
    found = sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))
    assert found, f"no golden case matches {pattern}"
    return found
