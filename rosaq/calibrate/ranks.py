"""Calibration on several processes: every rank runs its own batches, and sums go over all of them.

Without an initialised torch.distributed there is one rank, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Batch = TypeVar("_Batch")


def num_ranks() -> int:
    """Processes that calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """True on the one that writes."""
    return num_ranks() == 1 or dist.get_rank() == 0


def own_share(batches: list[_Batch]) -> list[_Batch]:
    """This rank's batches of a list that all ranks have: every num_ranks-th, so that each batch is what it would be in
    one process."""
    return batches if num_ranks() == 1 else batches[dist.get_rank() :: num_ranks()]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor`, with the sum over all ranks written into it."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_gradients(tensors: Iterable[Tensor]) -> None:
    """Replace the gradient of every tensor by its mean over the ranks."""
    if num_ranks() > 1:
        for tensor in tensors:
            if tensor.grad is None:  # of an expert that none of this rank's tokens went to
                tensor.grad = torch.zeros_like(tensor)
            sum_over_ranks(tensor.grad).div_(num_ranks())


def mean_over_ranks(value: float) -> float:
    """The mean of one number per rank."""
    return float(sum_over_ranks(torch.tensor(value, dtype=torch.float64))) / num_ranks()


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks one after the other, along their first dimension (of any length)."""
    if num_ranks() == 1:
        return tensor
    parts: list[Tensor] = [tensor] * num_ranks()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if num_ranks() > 1:
        dist.barrier()
