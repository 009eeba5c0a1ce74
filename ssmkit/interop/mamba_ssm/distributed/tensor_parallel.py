"""Split layers over one process: whole layers. Larger groups are refused."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.interop.mamba_ssm.distributed.distributed_utils import require_alone


class _Linear(nn.Linear):
    """nn.Linear with the official arguments.

    Args:
        in_features, out_features, bias, device, dtype: As in nn.Linear.
        process_group: Of one process, or None.
        sequence_parallel: Means nothing for one process.
        multiple_of: Divides the side that would be split.
    """

    split = "out_features"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_alone(process_group)
        size = {"in_features": in_features, "out_features": out_features}[self.split]
        if multiple_of < 1 or size % multiple_of:
            raise ValueError(f"{self.split} must be a multiple of multiple_of {multiple_of}, got {size}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = process_group, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        return super().forward(x)


class ColumnParallelLinear(_Linear):
    """A linear layer whose outputs would be split."""


class RowParallelLinear(_Linear):
    """A linear layer whose inputs would be split."""

    split = "in_features"


def parallel_linear_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Tensor:
    """x W^T + bias, for one process."""
    require_alone(process_group)
    return F.linear(x, weight, bias)


class VocabParallelEmbedding(nn.Embedding):
    """nn.Embedding whose rows would be split."""

    def __init__(self, num_embeddings: int, *args: Any, process_group: Any = None, **options: Any) -> None:
        require_alone(process_group)
        super().__init__(num_embeddings, *args, **options)
        self.process_group = process_group


class ColumnParallelEmbedding(VocabParallelEmbedding):
    """nn.Embedding whose columns would be split."""
