"""Attention by its official path. There it is not causal unless told so; here it is only if told so."""

import inspect
from typing import Any

from ssmkit import nn

__all__ = ["MHA"]


class MHA(nn.MHA):
    """`ssmkit.nn.MHA`, told causal=True: left out, it would mean False to the official layer.

    Raises:
        ValueError: causal is not True; the layer attends to earlier tokens only.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        if "causal" not in inspect.signature(nn.MHA).bind(*args, **options).arguments:
            raise ValueError(
                "causal must be True, got none, which here means False; give causal=True for a causal layer"
            )
        super().__init__(*args, **options)
