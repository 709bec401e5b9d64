"""Move what the whole quantised model stores until it predicts what the dense model predicts.

Tuning block by block asks every block to hide its own rounding errors; what they do to each other's is only seen at the
end. Here the loss is KL(dense || quantised) of the next token. Codes stay as they are: scales, salient weights and the
norms' gains move (as in the second phase of EfficientQAT, arXiv 2407.11062, which moves the scales).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rosaq.calibrate import BlockModel, mean_over_ranks
from rosaq.specs import TuneSpec
from rosaq.tuning.block import TunedBlock
from rosaq.tuning.descent import descend, draw_batches

_MEASURED = 8  # sequences that the divergence before and after is measured on
_SEQUENCES_AT_ONCE = 2  # in the passes without gradient: as many as in a step
# Tokens whose logits exist at once. On a CPU more do not fit its caches: 512 rows of 49,152 take half as long again.
_ON_CPU, _ON_GPU = 128, 512


@dataclass(frozen=True)
class Predictions:
    """embedded [sequences, length, d]: the calibration text after the embedding. dense [sequences, length, d]: what the
    dense model's last block makes of it. gain [d], head [vocab, d]: of the final norm and the head, common to both."""

    embedded: Tensor
    dense: Tensor
    gain: Tensor
    head: Tensor


def tune_model(
    model: BlockModel,
    blocks: list[TunedBlock],
    predictions: Predictions,
    spec: TuneSpec,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[float, float]:
    """Tune `blocks` in place for `spec.model_steps`; (divergence before, after) in nats per token, on the first
    sequences. progress is called with (steps done, steps). With several ranks each has its own sequences.

    Memory holds the codes of all blocks, one byte each, the hidden states of a batch once per block, and one block's
    weights: every block is run again for its gradient. Raises ValueError if the divergence is not finite.
    """
    measured = torch.arange(min(_MEASURED, len(predictions.embedded)))
    if model.is_bf16:  # once, not in every product
        predictions = replace(predictions, head=predictions.head.bfloat16())
    before = _divergence(model, blocks, predictions, measured)
    batches = draw_batches(len(predictions.embedded), spec.model_steps, spec, seed)
    groups = [(tensor, spec.model_rates * rate) for block in blocks for tensor, rate in block.groups(spec)]
    for step, batch in enumerate(descend(groups, batches)):
        out = _run(model, blocks, predictions.embedded[batch])
        leaf = out.detach().requires_grad_()
        normed = model.final_norm(leaf, predictions.gain)
        _, slope = _kl(model, normed.detach(), predictions, batch)
        torch.autograd.backward(normed, slope)
        assert leaf.grad is not None
        out.backward(leaf.grad)
        progress(step + 1, len(batches))
    after = _divergence(model, blocks, predictions, measured)
    if not math.isfinite(after):
        raise ValueError(f"tuning: the whole model: got a divergence of {after}, need a finite one")
    return before, after


def _run(model: BlockModel, blocks: list[TunedBlock], hidden: Tensor) -> Tensor:
    """Hidden states after the last block; only the blocks' inputs are kept for the way back."""
    for index, block in enumerate(blocks):

        def run(entering: Tensor, index: int = index, block: TunedBlock = block) -> Tensor:
            return block.run(model, index, entering)

        hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
    return hidden


@torch.no_grad()
def _kl(model: BlockModel, normed: Tensor, predictions: Predictions, sequences: Tensor) -> tuple[float, Tensor]:
    """(mean KL(dense || quantised) over the tokens of `sequences`, its gradient) for what enters the head, [batch,
    length, d]. A few tokens at a time: a row of logits is as wide as the vocabulary."""
    total, slopes, head = 0.0, [], predictions.head
    at_once = _ON_CPU if normed.device.type == "cpu" else _ON_GPU
    dense = model.final_norm(predictions.dense[sequences], predictions.gain)
    for own, wanted in zip(*(x.to(head.dtype).flatten(0, 1).split(at_once) for x in (normed, dense)), strict=True):
        log_p, log_q = (linear(x, head).log_softmax(-1, dtype=torch.float32) for x in (wanted, own))
        p = log_p.exp()
        total += float(torch.einsum("tv,tv->t", p, log_p.sub_(log_q)).sum())
        slopes.append(log_q.exp_().sub_(p).to(head.dtype) @ head)
    tokens = normed[..., 0].numel()
    return total / tokens, torch.cat(slopes).view_as(normed).float() / tokens


@torch.no_grad()
def _divergence(model: BlockModel, blocks: list[TunedBlock], predictions: Predictions, sequences: Tensor) -> float:
    """Mean KL(dense || quantised) over the tokens of `sequences`."""
    total = 0.0
    for some in sequences.split(_SEQUENCES_AT_ONCE):
        out = _run(model, blocks, predictions.embedded[some])
        total += len(some) * _kl(model, model.final_norm(out, predictions.gain), predictions, some)[0]
    return mean_over_ranks(total / len(sequences))
