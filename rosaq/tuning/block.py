"""Move what a quantised block stores until it answers its own inputs as the dense block answered the dense model's.

The loss is the squared error of the block's output, relative to each token's own energy (a massive activation is a
thousand times larger than anything else and would be all the loss) and weighted by the token's importance (an attention
sink is one token of hundreds, and everything attends to it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, mean_over_ranks
from rosaq.specs import TuneSpec
from rosaq.tuning.descent import descend, draw_batches
from rosaq.tuning.linear import TunedLinear

Tensors = dict[str, Tensor]
_SEQUENCES_AT_ONCE = 8  # in the passes without gradient
_MEASURED = 8  # sequences that the loss before and after is measured on


class Sequences:
    """Sequences [length, d] that lie in batches [batch, length, d]. Never joined: the streams of a long calibration
    text are the largest tensors of a run."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._each = [sequence for batch in batches for sequence in batch]

    def __len__(self) -> int:
        return len(self._each)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._each)

    def first(self, count: int) -> Sequences:
        """The first `count` of them."""
        return Sequences([torch.stack(self._each[:count])])

    def at(self, numbers: Tensor) -> Tensor:
        """Those with these numbers, [len(numbers), length, d]."""
        return torch.stack([self._each[number] for number in numbers.tolist()])


@dataclass(frozen=True)
class TuningTokens:
    """inputs, targets, each [sequences, length, d]: what enters the quantised block, and what the dense block made of
    the dense model's tokens. importance [sequences, length] or None: all equal."""

    inputs: Sequences
    targets: Sequences
    importance: Tensor | None = None

    def first(self, count: int) -> TuningTokens:
        """The first `count` sequences."""
        importance = None if self.importance is None else self.importance[:count]
        return TuningTokens(self.inputs.first(count), self.targets.first(count), importance)

    def weights(self) -> Tensor:
        """Weight of each token's squared error, [sequences, length]: importance over energy, mean importance 1."""
        energy = torch.stack([sequence.square().sum(-1) for sequence in self.targets]).clamp_min(1e-20)
        if self.importance is None:
            return 1 / energy
        return self.importance / self.importance.mean() / energy


class TunedBlock:
    """The trainable tensors of one block. gains: the norms' weights by name, which multiply by gain_offset + weight;
    others: tensors that stay as they are."""

    def __init__(
        self,
        linears: dict[str, TunedLinear],
        gains: Tensors,
        others: Tensors,
        dtype: torch.dtype,
        *,
        gain_offset: float = 0.0,
    ) -> None:
        self.linears, self._others, self._dtype = linears, others, dtype
        self._gains, self._offset = gains, gain_offset
        self._stretch = {name: torch.zeros_like(gain).requires_grad_() for name, gain in gains.items()}

    def gains(self) -> Tensors:
        """The norms' weights, as stored in 16 bits, float32."""
        result: Tensors = {}
        for name, gain in self._gains.items():
            wanted = gain + (self._offset + gain) * self._stretch[name]
            result[name] = wanted + (wanted.detach().to(self._dtype).float() - wanted.detach())
        return result

    def tensors(self) -> Tensors:
        """All tensors of the block as its code runs them, differentiable."""
        weights = {f"{name}.weight": linear.weight() for name, linear in self.linears.items()}
        return self._others | weights | self.gains()

    def run(self, model: BlockModel, index: int, hidden: Tensor) -> Tensor:
        """Block `index` of the model on hidden [batch, length, d], differentiable, as with `tensors()`."""
        calls = {name: linear.product for name, linear in self.linears.items()}
        return model.forward(index, self._others | self.gains(), hidden, calls)

    def groups(self, spec: TuneSpec) -> Iterator[tuple[Tensor, float]]:
        """(trainable tensor, its learning rate)."""
        for linear in self.linears.values():
            if linear.latent is not None:
                yield linear.latent, spec.codes_rate
            yield linear.stretch, spec.scales_rate
            if linear.shift is not None:
                yield linear.shift, spec.salient_rate
        for stretch in self._stretch.values():
            yield stretch, spec.gains_rate


def tune_block(
    model: BlockModel, index: int, block: TunedBlock, tokens: TuningTokens, spec: TuneSpec, seed: int
) -> tuple[float, float]:
    """Tune `block` in place; (loss before, loss after) on its first sequences. Deterministic for a seed and a number of
    threads. Raises ValueError if the loss is not finite."""
    weights = tokens.weights()
    before = block_loss(model, index, block, tokens.first(_MEASURED))
    batches = draw_batches(len(tokens.inputs), spec.steps, spec, seed)
    for batch in descend(block.groups(spec), batches):
        _loss(model, index, block.tensors(), tokens, weights, batch).backward()
    after = block_loss(model, index, block, tokens.first(_MEASURED))
    if not math.isfinite(after):
        raise ValueError(f"tuning: {model.family.block_prefix(index)[:-1]}: got a loss of {after}, need a finite one")
    return before, after


@torch.no_grad()
def block_loss(model: BlockModel, index: int, block: TunedBlock, tokens: TuningTokens) -> float:
    """Mean weighted relative squared error of the block's output over all tokens."""
    weights, tensors, total = tokens.weights(), block.tensors(), 0.0
    for batch in torch.arange(len(tokens.inputs)).split(_SEQUENCES_AT_ONCE):
        total += float(_loss(model, index, tensors, tokens, weights, batch)) * len(batch)
    return mean_over_ranks(total / len(tokens.inputs))


def _loss(
    model: BlockModel,
    index: int,
    tensors: Tensors,
    tokens: TuningTokens,
    weights: Tensor,
    batch: Tensor,
) -> Tensor:
    out = model.forward(index, tensors, tokens.inputs.at(batch))
    error = (out.float() - tokens.targets.at(batch)).square().sum(-1)
    return (error * weights[batch]).mean()
