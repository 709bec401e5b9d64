"""Weighted second moments of a linear's inputs, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Inputs x [tokens, k] of a linear and their importance [tokens] >= 0 (None: all equal).

    One object, so that a shuffle of the tokens cannot leave their weights behind.
    """

    x: Tensor
    importance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2:
            raise ValueError(f"x: got shape {tuple(self.x.shape)}, need [tokens, k]")
        if self.importance is not None and self.importance.shape != self.x.shape[:1]:
            raise ValueError(
                f"importance: got shape {tuple(self.importance.shape)}, need ({self.x.shape[0]},), one per token of x"
            )

    def reordered(self, index: Tensor) -> Tokens:
        """The tokens at `index`, each with its own importance."""
        return Tokens(self.x[index], None if self.importance is None else self.importance[index])


class Gram:
    """Running G [k, k] = sum of w_t x_t x_tᵀ / sum of w_t over all tokens added, in float64."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._weight = 0.0

    def add_tokens(self, tokens: Tokens) -> None:
        """Add a batch; ValueError if it holds NaN or Inf."""
        x = tokens.x.double()
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise ValueError(f"activations: got NaN or Inf in {bad} of {len(x)} tokens, need finite numbers")
        if tokens.importance is None:
            self._weight += len(x)
        else:
            weight = tokens.importance.double()
            self._weight += float(weight.sum())
            x = x * weight.sqrt()[:, None]
        self._sum.addmm_(x.T, x)

    def mean(self) -> Tensor:
        """G [k, k] float64; ValueError before any token of positive importance was added."""
        if self._weight <= 0:
            raise ValueError("gram: got no token of positive importance, need at least one")
        return self._sum / self._weight
