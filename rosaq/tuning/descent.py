"""The steps of tuning: which sequences come when, and Adam with a learning rate of its own for each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rosaq.calibrate import average_gradients, mean_over_ranks, num_ranks
from rosaq.specs import TuneSpec


def draw_batches(num_sequences: int, steps: int, spec: TuneSpec, seed: int) -> list[Tensor]:
    """Batches of sequence numbers, one per step: every sequence once before any comes again, at most `spec.passes`
    times over all of them. With several ranks each draws its part of a step from its own sequences."""
    generator = torch.Generator().manual_seed(seed)
    size = min(max(1, spec.batch_size // num_ranks()), num_sequences)
    most = round(mean_over_ranks(max(1, spec.passes * num_sequences // size)))  # the same number of steps everywhere
    waiting, batches = torch.empty(0, dtype=torch.int64), list[Tensor]()
    for _ in range(min(steps, most)):
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(num_sequences, generator=generator)])
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches


def descend(groups: Iterable[tuple[Tensor, float]], batches: list[Tensor]) -> Iterator[Tensor]:
    """Yield the batches one by one; whoever takes one leaves gradients on the tensors of `groups` (tensor, learning
    rate), and a step of Adam follows. Tensors with a rate of 0 stay."""
    trainable = [(tensor, rate) for tensor, rate in groups if rate]
    each = [{"params": [tensor], "lr": rate} for tensor, rate in trainable]
    optimizer = torch.optim.Adam(each, betas=(0.9, 0.95), fused=True)
    for step, batch in enumerate(batches):
        for group, (_, rate) in zip(optimizer.param_groups, trainable, strict=True):
            group["lr"] = rate * _share(step, len(batches))
        optimizer.zero_grad()
        yield batch
        average_gradients(tensor for tensor, _ in trainable)
        optimizer.step()


def _share(step: int, steps: int) -> float:
    """Of the learning rate: a tenth of the steps to warm up, then a half cosine to zero."""
    return min(1.0, (step + 1) / max(1.0, 0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
