"""Causal attention of the passes over the calibration text, as plain matrix products over blocks of queries.

At the lengths of calibration it takes less time on a CPU than torch's fused attention (DESIGN.md 4 has the figures),
adds gradients up in the same order every time, and knows how much attention every token got, which importance wants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "rosaq_calibration"  # its name in transformers


class Tiles(NamedTuple):
    """rows: queries of a block. scores: that exist at once."""

    rows: int
    scores: int


_ON_CPU = Tiles(128, 1 << 20)  # what stays in its caches
_ON_GPU = Tiles(1024, 1 << 27)  # which wants few large products


def register_attention() -> None:
    """Make `ATTENTION` known to transformers, with masks as its "sdpa" gets them."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers calls an attention function. query [batch, heads, length, d], key and value of the key-value
    heads; mask bool [batch, 1, length, length], the same for all sequences (nothing is padded), None: causal ->
    (outputs [batch, length, heads, d], attention each token got, summed over heads and queries [batch, length])."""
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise ValueError(
            f"attention: {type(module).__name__}: got {unknown or 'attention that is not causal'}, "
            "need causal attention by plain softmax"
        )
    mask = None if attention_mask is None else attention_mask[0, 0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, received = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), received


class _Attention(torch.autograd.Function):
    """Scores and softmax in float32; products with probabilities in the dtype of `value`, and all products of the way
    back. What is kept for it, where there is one, are the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        (batch, heads, length, d), kv_heads = query.shape, key.shape[1]
        shared = heads // kv_heads  # query heads of one key-value head are adjacent
        q = (query * scale).reshape(batch * kv_heads, shared, length, d)
        k, v = key.reshape(batch * kv_heads, length, d), value.reshape(batch * kv_heads, length, -1)
        out = v.new_empty(*q.shape[:3], v.shape[2])
        received = torch.zeros(batch * kv_heads, length, device=q.device)
        rows, most = _ON_CPU if q.device.type == "cpu" else _ON_GPU
        rows = min(rows, length)
        at_once = max(1, most // (shared * rows * length))
        at_once = min(at_once, kv_heads) if q.device.type == "cpu" else at_once  # memory for one sequence's
        blocked = _blocked(mask, rows, q.device)
        goes_back, kept = any(ctx.needs_input_grad), list[Tensor]()
        with torch.autocast(q.device.type, enabled=False):
            wide_q, wide_k = q.float(), k.float()
            for part in _slices(len(q), at_once):
                for block in _slices(length, rows):
                    end = block.stop
                    scores = wide_q[part, :, block].flatten(1, 2) @ wide_k[part, :end].transpose(1, 2)
                    scores = scores.view(-1, shared, end - block.start, end)
                    if mask is None:  # all keys before the block are seen by all of it
                        scores[..., block.start :] += blocked[: end - block.start, : end - block.start]
                    else:
                        scores += blocked[block, :end]
                    probabilities = scores.softmax(-1)
                    received[part, :end] += probabilities.sum((1, 2))
                    narrow = probabilities.flatten(1, 2).to(v.dtype)
                    out[part, :, block] = (narrow @ v[part, :end]).unflatten(1, (shared, -1))
                    kept += [narrow] if goes_back else []
        if goes_back:
            ctx.save_for_backward(q.to(v.dtype), k.to(v.dtype), v, out, *kept)
            ctx.plan = rows, at_once, scale, (query.dtype, key.dtype)
        received = received.view(batch, kv_heads, length).sum(1)
        ctx.mark_non_differentiable(received)
        return out.view(batch, heads, length, -1), received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *kept = ctx.saved_tensors
        rows, at_once, scale, (query_dtype, key_dtype) = ctx.plan
        kv_heads = grads[0].shape[1] // q.shape[1]
        slope = grads[0].to(v.dtype).reshape(out.shape)
        shared = (slope.float() * out.float()).sum(-1).to(v.dtype)  # what softmax takes off every slope of its row
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k, v))
        blocks = [(part, block) for part in _slices(len(q), at_once) for block in _slices(q.shape[2], rows)]
        with torch.autocast(q.device.type, enabled=False):
            for (part, block), probabilities in zip(blocks, kept, strict=True):
                end = block.stop
                given, asked = slope[part, :, block].flatten(1, 2), q[part, :, block].flatten(1, 2)
                dv[part, :end] += probabilities.transpose(1, 2) @ given
                scores = given @ v[part, :end].transpose(1, 2)
                scores = scores.sub_(shared[part, :, block].flatten(1, 2)[..., None]).mul_(probabilities)
                dq[part, :, block] = (scores @ k[part, :end]).unflatten(1, (q.shape[1], -1))
                dk[part, :end] += scores.transpose(1, 2) @ asked
        batch = len(q) // kv_heads
        return (
            (dq * scale).to(query_dtype).view(batch, -1, *q.shape[2:]),
            dk.to(key_dtype).view(batch, kv_heads, *k.shape[1:]),
            dv.to(v.dtype).view(batch, kv_heads, *v.shape[1:]),
            None,
            None,
        )


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _blocked(mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """What is added to scores: -inf where a query may not look. Without a mask, of a block on the diagonal."""
    if mask is not None:
        return torch.zeros(mask.shape, device=device).masked_fill_(~mask, -torch.inf)
    return torch.full((rows, rows), -torch.inf, device=device).triu_(1)
