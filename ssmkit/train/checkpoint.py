"""Checkpoints and run folders: written whole or not at all, read with errors that say what is wrong.

A run folder holds

    config.json             what was trained on what, for people and for resuming
    checkpoints/last.ckpt   the newest checkpoint, replaced in one step; it holds the same description
    logs/                   what the loggers write
"""

import importlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssmkit.data.atomic import atomic_write, atomic_write_text

CONFIG, LAST, LOGS = "config.json", Path("checkpoints") / "last.ckpt", "logs"


class RunError(ValueError):
    """A run folder or checkpoint that cannot be used; the message says why and what to do."""


def import_lightning() -> Any:
    """lightning.pytorch, or an error that says how to get it."""
    try:
        return importlib.import_module("lightning.pytorch")
    except ImportError as error:
        raise ImportError("training needs Lightning: pip install 'ssmkit[train]'") from error


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint, in full or not at all: a kill in between leaves the one before."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint; every fault is a `RunError` that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path} is truncated or corrupt ({reason}); restore it from a copy or train again with --overwrite"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise RunError(f"{path} is not a training checkpoint: it has no state_dict")
    return checkpoint


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    atomic_write_text(run / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(run: Path) -> dict[str, Any]:
    """Read config.json; a `RunError` if the folder is no run or the file is damaged."""
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder (it has no {CONFIG}); start one with `ssmkit train`")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is corrupt ({error})") from error
    return config


def atomic_checkpoint_io() -> Any:
    """Lightning's plugin for checkpoint files, on `save_checkpoint` and `load_checkpoint`."""
    base = importlib.import_module("lightning.pytorch.plugins.io").TorchCheckpointIO

    class AtomicCheckpointIO(base):  # type: ignore[misc, valid-type]
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            save_checkpoint(checkpoint, path)

        def load_checkpoint(
            self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
        ) -> dict[str, Any]:
            return load_checkpoint(path, map_location)

    return AtomicCheckpointIO()
