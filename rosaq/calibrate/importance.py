"""Which tokens the second moments should listen to (RSQ, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate.blocks import BlockPass
from rosaq.calibrate.ranks import gather
from rosaq.specs import ImportanceSpec


def importance_from_scores(scores: Tensor, spec: ImportanceSpec) -> Tensor:
    """Raw scores [batch, length] -> importance [batch, length] with mean 1 in every sequence.

    Min-max per sequence to [floor, 1], as RSQ does: the least important token still counts `floor`. Equal scores give
    equal importance.
    """
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    if spec.quantile < 1:
        high = scores.quantile(spec.quantile, dim=-1, keepdim=True)
    spread = (high - low).clamp_min(1e-30)  # equal scores: everything at the floor, which the mean makes 1 again
    share = ((scores - low) / spread).clamp_max(1)
    importance = (spec.floor + (1 - spec.floor) * share) ** spec.exponent
    return importance / importance.mean(-1, keepdim=True)


def distance_scores(hidden: Tensor) -> Tensor:
    """Mean squared distance of each token of hidden [batch, length, d] to those of its sequence: [batch, length]."""
    square = hidden.square().sum(-1)
    mean = hidden.mean(1, keepdim=True)
    return square + square.mean(-1, keepdim=True) - 2 * (hidden * mean).sum(-1)


def chunk_importance(batch: int, length: int, spec: ImportanceSpec) -> Tensor:
    """1 in the chosen chunks and 0 elsewhere, brought to mean 1: [batch, length]. ValueError if there are fewer tokens
    than chunks."""
    if length < spec.num_chunks:
        raise ValueError(f"chunks: got sequences of {length} tokens, need at least num_chunks {spec.num_chunks}")
    number = torch.arange(length) * spec.num_chunks // length
    chosen = torch.isin(number, torch.tensor(spec.chunks)).float()
    return (chosen / chosen.mean()).expand(batch, length)


def token_importance(hidden: Tensor, spec: ImportanceSpec, counts: Tensor, passed: BlockPass) -> Tensor | None:
    """Importance [batch * length] of the tokens hidden [batch, length, d] that enter a block; None: all equal.

    counts [batch, length]: how often each token occurs in the calibration text. passed: the tokens' way through the
    block, to its end where `spec.needs_pass`. ValueError where the architecture does not tell who attended to whom.
    """
    if spec.strategy == "uniform":
        return None
    if spec.strategy == "chunks":
        return chunk_importance(hidden.shape[0], hidden.shape[1], spec).flatten().to(hidden.device)
    if spec.strategy == "attention":
        if passed.received is None:
            raise ValueError(
                "importance: got no attention probabilities from the model's attention, need an architecture that uses "
                "transformers' attention interface, or another importance than 'attention'"
            )
        scores = passed.received
    elif spec.strategy == "norm":
        scores = hidden.norm(dim=-1)
    elif spec.strategy == "change":
        assert passed.output is not None
        scores = -(passed.output - hidden).norm(dim=-1)
    elif spec.strategy == "distance":
        scores = distance_scores(hidden)
    else:
        scores = -counts.float()
    return importance_from_scores(scores, spec).flatten()


def importance_summary(importance: list[Tensor | None]) -> dict[str, Any] | None:
    """What importance does to a block's tokens: `effective_share` (sum)² / (count * sum of squares), 1 where all count
    the same and 1 / count where one counts alone; `histogram`, the share of tokens in each power of two of the weight,
    from below 1/4 to 64 and above. None where all count the same by definition."""
    given = [weight for weight in importance if weight is not None]
    if not given:
        return None
    weights = gather(torch.cat(given).cpu()).double()
    bins = torch.bucketize(weights, 2.0 ** torch.arange(-2.0, 7.0, dtype=torch.float64), right=True)
    share = torch.bincount(bins, minlength=10).double() / len(weights)
    effective = weights.sum().square() / (len(weights) * weights.square().sum())
    return {"effective_share": float(effective), "histogram": share.tolist()}
