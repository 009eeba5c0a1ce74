"""The switch of deterministic kernels. ssmkit's are deterministic whichever way it stands."""

import os

import torch

_CHOSEN: dict[str, bool | None] = {"mode": None}


def set_deterministic_mode(value: bool | None) -> None:
    """Choose what `use_deterministic_mode` says; None leaves it to the environment and torch again."""
    _CHOSEN["mode"] = value


def use_deterministic_mode() -> bool:
    """What was set; else whether MAMBA_DETERMINISTIC starts with 1, if it is there; else torch's own setting."""
    chosen = _CHOSEN["mode"]
    if chosen is not None:
        return chosen
    asked = os.environ.get("MAMBA_DETERMINISTIC")
    return asked.startswith("1") if asked else torch.are_deterministic_algorithms_enabled()
