"""Which directions of a site's input stay in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_index(gram: Tensor, count: int) -> Tensor:
    """The `count` input channels with the largest second moment, ascending int64 [count]. gram [k, k]."""
    if not 0 <= count <= gram.shape[0] // 4:
        raise ValueError(f"salient: got {count}, need 0 to in_features / 4 = {gram.shape[0] // 4}")
    return torch.sort(torch.topk(torch.diagonal(gram), count).indices).values


def salient_mask(in_features: int, index: Tensor | None, device: torch.device | None = None) -> Tensor:
    """bool [in_features] on `device` (None: the CPU), True at the salient channels."""
    mask = torch.zeros(in_features, dtype=torch.bool, device=device)
    if index is not None:
        mask[index.to(mask.device)] = True
    return mask
