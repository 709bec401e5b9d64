"""Buffers that a model computes rather than stores, for a model whose weights are on the meta device."""

from __future__ import annotations

import torch
from torch import nn


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Give the buffers that are computed rather than stored (rotary frequencies, embedding scales) their values: on the
    meta device they have none. By transformers' own way, which `from_pretrained` takes too. Made on the CPU."""
    for name, module in model.named_modules():
        buffers = {key: module._buffers[key] for key in module._non_persistent_buffers_set if key in module._buffers}
        for key, buffer in buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.full(buffer.shape, torch.nan, dtype=buffer.dtype)
        if buffers:
            with torch.no_grad():
                model._init_weights(module)  # type: ignore[operator]
        for key in buffers:
            if (value := module._buffers[key]) is not None and value.isnan().any():
                raise ValueError(f"model: {name}.{key}: got a buffer that its model does not compute, need one it does")
            if value is not None:
                module._buffers[key] = value.to(device)
