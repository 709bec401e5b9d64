"""What the tensors of one linear must be, said once for whoever loads, cuts or verifies them."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_problem(tensor: Tensor | None, shape: tuple[int, ...], dtype: str) -> str | None:
    """Why `tensor` is no `dtype` tensor of this shape with finite numbers; None where it is."""
    if tensor is None or tensor.device.type == "meta":
        return f"got no values, need {dtype} {list(shape)}; is the checkpoint whole?"
    if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, dtype):
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        return f"got {got}, need {dtype} {list(shape)}"
    return finite_problem(tensor)


def finite_problem(tensor: Tensor) -> str | None:
    """How many entries of `tensor` are NaN or infinite; None where none is."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    return f"got {int((~torch.isfinite(tensor)).sum())} NaN or Inf of {tensor.numel()}, need finite numbers"


def index_problem(index: Tensor, in_features: int) -> str | None:
    """Why the channels `index` [r] are not different ones of [0, in_features); None where they are."""
    if not len(index):
        return None
    low, high, num = int(index.min()), int(index.max()), len(set(index.tolist()))
    if low >= 0 and high < in_features and num == len(index):
        return None
    return f"got {num} different channels from {low} to {high}, need {len(index)} in [0, {in_features})"


def check_index(index: Tensor, in_features: int, name: str) -> None:
    """ValueError naming the linear `name` unless its `index` [r] holds different channels of [0, in_features)."""
    problem = index_problem(index, in_features)
    if problem is not None:
        raise ValueError(f"{name}.salient_index: {problem}")
