"""Which tokens the second moments should listen to (RSQ, section 4)."""

from __future__ import annotations

from torch import Tensor

from rosaq.calibrate.blocks import BlockModel
from rosaq.config import ImportanceSpec


def importance_from_scores(scores: Tensor, floor: float) -> Tensor:
    """Raw scores [batch, length] -> importance [batch, length] with mean 1 in every sequence.

    Min-max per sequence to [floor, 1], as RSQ does: the least important token still counts `floor`. The result enters
    the gram to the first power. ValueError unless 0 < floor <= 1.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor: got {floor}, need 0 < floor <= 1")
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    spread = (high - low).clamp_min(1e-30)  # equal scores: everything at the floor, which the mean makes 1 again
    importance = floor + (1 - floor) * (scores - low) / spread
    return importance / importance.mean(-1, keepdim=True)


def token_importance(
    model: BlockModel, index: int, weights: dict[str, Tensor], hidden: Tensor, spec: ImportanceSpec
) -> Tensor | None:
    """Importance [batch * length] of the tokens hidden [batch, length, d] that enter block `index`; None: all equal."""
    if spec.strategy == "uniform":
        return None
    scores = model.attention_received(index, weights, hidden)
    return importance_from_scores(scores, spec.floor).flatten()
