"""Fit a rotation to the weights: in the right basis a few evenly spaced levels lose less of them.

A row has one scale, so what rounding leaves of it grows with its range, and error feedback spreads that over the
columns. Two things of the basis count then. Where a gain stands before the columns (a norm's, or the rows of the linear
that makes them), it can give all of them the same energy, and what is left falls to the geometric mean of their
energies: a basis that makes those unequal is a good one. And rows with light tails lose less than Gaussian ones, which
is what rows are in a random basis. Both are functions of the weights alone, smooth in the basis, and much cheaper than
rounding.

SpinQuant (arXiv 2405.16406) fits rotations by the loss of a model whose activations are quantised, KurTail (arXiv
2503.01483) by the tails of those activations; here it is the weights that are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.rotation.orthogonal import random_orthogonal

_GAUSSIAN = 15**0.5  # root of the sixth moment of a Gaussian of variance 1
_OF_TAILS = 0.2  # log of the loss for each unit of that root; by what GPTQ leaves of 3-bit weights
_MIXED = 64  # neighbours in the order of their energies that a basis starts from mixed
_RATE, _RATE_OF_HEADS = 0.12, 0.4  # times the root of the size: radians of a step, about
_STEPS_OF_HEADS = 100
_BETAS = (0.9, 0.95)
_LEAST = 1e-30


@dataclass(frozen=True)
class StreamWeight:
    """A weight beside the residual stream, as far as the stream's basis matters to it. It reads the stream: rows
    [n, d], each times the root of what its errors cost. Or it writes into it: columns [d, k] (`writes`). share: of the
    whole model's rounding loss."""

    weight: Tensor
    share: float
    writes: bool = False

    def loss(self, basis: Tensor) -> Tensor:
        """Its share of the logarithm of the loss in the basis [d, m]."""
        return self.share * (_of_tails(basis.T @ self.weight) if self.writes else _log_loss(self.weight @ basis, (0,)))


def start_basis(moments: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """The span of basis [d, m] turned to the principal axes of moments [d, d] (second moments of rows that read the
    stream), float64, neighbours mixed: energies stay unequal, and rows are nearly Gaussian already."""
    axes = torch.linalg.eigh(basis.T @ moments @ basis)[1]
    mixed = [part @ random_orthogonal(part.shape[1], generator).to(part) for part in axes.split(_MIXED, 1)]
    return basis @ torch.cat(mixed, 1)


def fit_basis(basis: Tensor, batches: Iterable[list[StreamWeight]], steps: int) -> Tensor:
    """basis [d, m] float64, orthonormal columns, turned within its span so that the losses of `batches` (one for each
    of `steps`) become small; float64, orthonormal."""
    descent, current = _Descent(steps, _RATE / basis.shape[1] ** 0.5), basis.float()
    for batch in batches:
        leaf = current.clone().requires_grad_()
        torch.stack([weight.loss(leaf) for weight in batch]).sum().backward()
        assert leaf.grad is not None
        current = current @ descent.turn(current.T @ leaf.grad)
    return basis @ _orthonormal(basis.T @ current.double())


def fit_heads(rows: Tensor, start: Tensor) -> Tensor:
    """T [heads, d, d] float64, invertible, for x' = x T of each head: an orthogonal matrix fitted to rows
    [n, heads, group, d] of the linear that reads them (`group` query heads share one key-value head), from `start` on,
    times a scale a channel that gives all its columns the same energy."""
    heads, d = start.shape[:2]
    descent, current, narrow = _Descent(_STEPS_OF_HEADS, _RATE_OF_HEADS / d**0.5), start.float(), rows.float()
    for _ in range(_STEPS_OF_HEADS):
        leaf = current.clone().requires_grad_()
        turned = torch.einsum("nhgd,hde->nghe", narrow, leaf)
        _log_loss(turned, (0, 1)).backward()
        assert leaf.grad is not None
        current = current @ descent.turn(current.transpose(1, 2) @ leaf.grad)
    turn = _orthonormal(current.double())
    energy = torch.einsum("nhgd,hde->nghe", rows.double(), turn).square().sum((0, 1))
    return turn * even_scales(energy.flatten()).view(heads, 1, d)


def even_scales(energy: Tensor) -> Tensor:
    """Scales [m] whose geometric mean is 1, such that columns of these energies [m] divided by them have all the same.
    A column of next to nothing counts as a thousandth of the mean one: it may be anything."""
    root = energy.clamp_min(1e-6 * energy.mean()).clamp_min(_LEAST).sqrt()
    return root / root.log().mean().exp()


def _log_loss(rows: Tensor, over: tuple[int, ...]) -> Tensor:
    """Logarithm of what rounding leaves of rows [n, ...], each times the root of what its errors cost, once every
    column is divided by its root mean square over the dimensions `over`; up to a constant."""
    energy = rows.square().sum(over, keepdim=True).clamp_min(_LEAST)
    return energy.log().mean() + _of_tails((rows * energy.rsqrt()).flatten(1))


def _of_tails(rows: Tensor) -> Tensor:
    """What the tails of rows [n, m] add to the logarithm of the loss: 0 for Gaussian ones."""
    squares = rows.square()
    squares = squares / squares.mean().clamp_min(_LEAST)
    energy = squares.mean(1).clamp_min(_LEAST)
    roots = (squares.pow(3).mean(1) / energy).clamp_min(_LEAST).sqrt()  # energy times that of a row of variance 1
    return _OF_TAILS * (roots.sum() / energy.sum() - _GAUSSIAN)


class _Descent:
    """Adam on orthogonal matrices [..., m, m]: on the skew part of the gradient in the matrix's own frame, which is all
    of it that is a rotation. rate: radians that an entry moves in a step at most; it warms up and falls to nothing."""

    def __init__(self, steps: int, rate: float) -> None:
        self._steps, self._rate, self._done = steps, rate, 0
        self._mean, self._square = torch.zeros(()), torch.zeros(())

    def turn(self, slope: Tensor) -> Tensor:
        """The rotation [..., m, m] of the next step. slope: the gradient by the matrix, multiplied by its transpose."""
        skew = slope - slope.transpose(-1, -2)
        self._done += 1
        self._mean = torch.lerp(self._mean.to(skew), skew, 1 - _BETAS[0])
        self._square = torch.lerp(self._square.to(skew), skew.square(), 1 - _BETAS[1])
        mean, square = (x / (1 - b**self._done) for x, b in zip((self._mean, self._square), _BETAS, strict=True))
        share = min(1.0, 10 * self._done / self._steps) * 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        step = self._rate * share * mean / square.sqrt().clamp_min(_LEAST)
        return _orthonormal(torch.eye(step.shape[-1], device=step.device) - step)


def _orthonormal(near: Tensor) -> Tensor:
    """The orthogonal matrix that QR makes of one that is nearly so."""
    basis, upper = torch.linalg.qr(near)
    signs = torch.diagonal(upper, dim1=-2, dim2=-1).sign()
    fixed: Tensor = basis * signs[..., None, :]
    return fixed
