"""The gradient of a quantised linear with respect to its input, for adapters, prompt tuning and saliency maps.

The op has none, and a sum over other paths would look right without it. Weights stay frozen. Backward only:
forward mode (`torch.func.jvp`) sees no tangent of a quantised linear, and is not told so by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class InputGradient(torch.autograd.Function):
    """y [.., n] = run(x [.., k]), linear in x but for a bias. weight() gives the dense float32 [n, k] behind it, made
    on the way back and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad.float() @ ctx.weight()).to(grad.dtype), None, None
