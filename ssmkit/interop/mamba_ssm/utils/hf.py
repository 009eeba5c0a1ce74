"""Config and weights of a model in a local folder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmkit.models.language.weights import weight_files
from ssmkit.models.weights import read


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The entries of config.json."""
    return json.loads((_folder(model_name) / "config.json").read_text("utf-8"))


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors by name, moved and cast if asked."""
    tensors = read(weight_files(_folder(model_name)))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


def _folder(model_name: str | Path) -> Path:
    folder = Path(model_name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{model_name} is not a folder; nothing is downloaded here: fetch the repository's files first, "
            "then give the folder they are in"
        )
    return folder
