"""Weighted second moments of a linear's inputs.

Products are float32 over short runs of tokens, sums are float64: a float64 product costs twice the time, and what it
would add lies far below the damping. Only the upper triangle is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.calibrate.ranks import sum_over_ranks


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


_TOKENS_AT_ONCE = 1024  # summed in float32: an entry's error stays below 2**-20 of the energies of its two channels
_LOUD = 256  # tokens with more than so many times the median energy are summed in float64: a few in a thousand
_COLUMNS_AT_ONCE = 256  # of the upper triangle: smaller panels skip more of the lower one, larger ones multiply faster


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A ValueError from within begins with the linear whose inputs are at hand."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error


class Gram:
    """Running G [k, k] = sum of w_t x_t x_tᵀ / sum of w_t over all tokens added.

    Precision: |error of G_ij| <= 2**-20 sqrt(G_ii G_jj), whatever the number of tokens (float32 over 1024 tokens, then
    float64). `device`: of the tokens, None: the CPU. The result depends on the batches only in those last bits.
    """

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._weight = 0.0

    def add_tokens(self, tokens: Tokens) -> None:
        """Add a batch; ValueError if it holds NaN or Inf."""
        x = tokens.x
        weight = torch.ones(len(x), device=x.device) if tokens.importance is None else tokens.importance.float()
        self._weight += float(weight.double().sum())
        # A massive activation's rounding errors would drown what is left once its direction is kept in 16 bits.
        energy = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_().mul_(weight)
        if not energy.isfinite().all():
            bad = int((~energy.isfinite()).sum())
            raise ValueError(
                f"activations: got NaN, Inf or beyond 1e19 in {bad} of {len(x)} tokens, need finite numbers"
            )
        is_loud = energy > _LOUD * energy.median()
        loud = x[is_loud].double() * weight[is_loud].double().sqrt()[:, None]
        self._sum += loud.T @ loud
        root = weight.sqrt().masked_fill_(is_loud, 0)[:, None]
        for rows, by in zip(x.split(_TOKENS_AT_ONCE), root.split(_TOKENS_AT_ONCE), strict=True):
            chunk = rows * by
            for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
                left = chunk[:, start : start + _COLUMNS_AT_ONCE]
                self._sum[start : start + _COLUMNS_AT_ONCE, start:] += left.T @ chunk[:, start:]

    def sum_over_ranks(self) -> Gram:
        """This gram, of the tokens that were added on any rank. To be called once, on every rank."""
        self._sum = sum_over_ranks(self._sum)
        self._weight = float(sum_over_ranks(torch.tensor(self._weight, dtype=torch.float64)))
        return self

    def without(self, other: Gram) -> Gram:
        """The gram of this one's tokens but those of `other`, which are some of them."""
        rest = Gram(len(self._sum), self._sum.device)
        rest._sum, rest._weight = self._sum - other._sum, self._weight - other._weight
        return rest

    @property
    def has_tokens(self) -> bool:
        """True once a token of positive importance was added."""
        return self._weight > 0

    def mean(self) -> Tensor:
        """G [k, k] float64; ValueError before any token of positive importance was added."""
        if self._weight <= 0:
            raise ValueError("gram: got no token of positive importance, need at least one")
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / self._weight
