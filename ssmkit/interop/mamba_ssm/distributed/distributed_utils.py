"""Collectives over one process, which leave a tensor as it is; larger groups are refused."""

from typing import Any

import torch
from torch import Tensor


def require_alone(process_group: Any) -> None:
    """Refuse a group of more than one process; None is the default group, where there is one."""
    group = torch.distributed
    if process_group is not None:
        size = process_group.size()
    else:
        size = group.get_world_size() if group.is_available() and group.is_initialized() else 1
    if size != 1:
        raise ValueError(
            f"process_group must hold one process, got {size}: layers are not split over processes; "
            "wrap the model in DistributedDataParallel or fully_shard instead"
        )


def all_gather(input_: Tensor, process_group: Any = None) -> Tensor:
    """The tensors of all processes, of which there is one, joined along the first axis."""
    require_alone(process_group)
    return input_


def reduce_scatter(input_: Tensor, process_group: Any = None) -> Tensor:
    """This process's share, here all, of the sum over processes."""
    require_alone(process_group)
    return input_


def all_reduce(input_: Tensor, process_group: Any = None) -> Tensor:
    """The sum over processes, of which there is one."""
    require_alone(process_group)
    return input_


def sync_shared_params(model: torch.nn.Module, process_group: Any = None) -> None:
    """One process shares its parameters with nobody: nothing is done."""
    require_alone(process_group)


def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: Any = None) -> None:
    """The gradients of one process are the sum already: nothing is done."""
    require_alone(process_group)


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """What process local_rank gets of dim, split in multiples as evenly as they go; the first get one more."""
    if not 0 <= local_rank < world_size:
        raise ValueError(f"local_rank must be from 0 to world_size - 1 = {world_size - 1}, got {local_rank}")
    share, left = divmod(dim // multiple_of, world_size)
    return (share + (local_rank < left)) * multiple_of
