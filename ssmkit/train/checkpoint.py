"""Checkpoints and run folders: written whole or not at all, read with errors that say what is wrong.

A run folder holds

    config.json             what was trained on what, for people and for resuming
    checkpoints/last.ckpt   the newest checkpoint, replaced in one step; it holds the same description
    logs/                   what the loggers write
"""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssmkit.data.atomic import atomic_write, atomic_write_text

CONFIG, LAST, LOGS = "config.json", Path("checkpoints") / "last.ckpt", "logs"


class RunError(ValueError):
    """A run folder or checkpoint that cannot be used; the message says why and what to do."""


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
        # torch.load does not look at the archive's checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path} is truncated or corrupt ({reason}); restore it from a copy or train again with --overwrite"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise RunError(f"{path} is not a training checkpoint: it has no state_dict")
    return checkpoint


def process_rank() -> int:
    """Rank of this process as launchers tell it; 0 if there is but one."""
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0))


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


def prepare_run(run: Path, description: dict[str, Any], *, resume: bool, overwrite: bool) -> str | None:
    """Write the description of a new run, or check that of a resumed one; the checkpoint to continue from, if any.

    Only the first of several processes writes: the others may start when it already has.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if process_rank() > 0:
        return str(run / LAST) if resume and (run / LAST).is_file() else None
    if overwrite and (run / CONFIG).exists():
        for part in (LAST.parent, LOGS):
            shutil.rmtree(run / part, ignore_errors=True)
    elif not resume and (run / CONFIG).exists():
        raise RunError(f"{run} already holds a run; pass --resume to continue it, --overwrite to start anew")
    if not resume or not (run / CONFIG).exists():
        write_config(run, description)
        return None
    before = read_config(run)
    if before.get("kind") != description["kind"]:
        raise RunError(f"{run} holds a run of a {before.get('kind')} model, not of a {description['kind']} model")
    for part in (name for name, value in description.items() if isinstance(value, dict)):
        if differing(before.get(part), description[part]):
            raise RunError(
                f"{run} was started with another {part} ({differing(before.get(part), description[part])}); "
                "resume with the same arguments, or start anew with --overwrite"
            )
    return str(run / LAST) if (run / LAST).is_file() else None


def differing(before: Any, now: Any) -> str:
    """The entries in which two descriptions differ, as text; empty if none. Tuples and lists are alike, as in JSON."""
    before, now = (dict(value) if isinstance(value, dict) else {} for value in (before, now))
    plain = json.loads(json.dumps(now))
    keys = sorted(key for key in {*before, *plain} if before.get(key) != plain.get(key) and key != "source")
    return ", ".join(f"{key}: {before.get(key)} then, {plain.get(key)} now" for key in keys)
