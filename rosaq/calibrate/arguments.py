"""The arguments that a model passes to its blocks beside the hidden states: mask, positions, their embeddings."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from rosaq.models import Family


class Stop(Exception):
    """Ends a forward pass as soon as what is wanted exists."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps the keyword arguments that the model calls it with and passes the stream on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self._last = last

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs, self.hidden = kwargs, hidden
        if self._last:
            raise Stop
        return hidden


def call_arguments(model: nn.Module, blocks: list[nn.Module], family: Family, hidden: Tensor) -> list[dict[str, Any]]:
    """What `model` passes to each of its `blocks` for hidden states [batch, length, d] after the embedding.

    ValueError if the model does to the embeddings what nothing here does: every stream would be wrong.
    """
    recorders = [_Recorder(block, block is blocks[-1]) for block in blocks]
    parent_path, _, name = family.blocks.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, nn.ModuleList(recorders))
    try:
        with contextlib.suppress(Stop):
            parent(inputs_embeds=hidden, use_cache=False)
    finally:
        setattr(parent, name, nn.ModuleList(blocks))
    seen = recorders[0].hidden
    if seen is None or not torch.equal(hidden, seen):
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ValueError(
            f"model: {kind}: got embeddings that the model changes before its first block, need them to enter it as "
            f"{family.embedding!r} makes them"
        )
    return [recorder.kwargs for recorder in recorders]
