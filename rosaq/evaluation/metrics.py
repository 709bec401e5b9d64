"""Next-token statistics, added up window by window."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Rows of logits that are worked on at once: 64 x 151,936 float32 values are 39 MB, whatever the window's length.
CHUNK_ROWS = 64
# Tokens that see fewer than this many before them are one row: the first few differ from each other by chance only.
FIRST_RANGE = 32


class Tally:
    """Sums of the negative log likelihood, and of KL(reference || model) and top-1 agreement, over predicted tokens.

    Sums are float64. KL is kept per token as well (its 99th percentile shows what the mean hides).
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._nll_sum = 0.0
        self._kl: list[Tensor] = []
        self._num_agreeing = 0

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add predictions: logits [t, vocab] float, targets [t] int64, reference logits [t, vocab] or None."""
        if logits.dim() != 2 or targets.shape != logits.shape[:1]:
            raise ValueError(
                f"targets: got shape {list(targets.shape)} for logits {list(logits.shape)}, need [t] for [t, vocab]"
            )
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(
                f"reference: got logits {list(reference.shape)}, need {list(logits.shape)} as the model gives "
                "(is it a model of the same vocabulary?)"
            )
        if self.num_tokens and (reference is not None) != bool(self._kl):
            raise ValueError(f"reference: got {'some' if reference is not None else 'none'}, need the same every time")
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            self._add_chunk(logits[rows], targets[rows], None if reference is None else reference[rows])
        self.num_tokens += len(targets)

    def _add_chunk(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        log_p = functional.log_softmax(logits.float(), -1)
        self._nll_sum -= float(log_p.gather(-1, targets.unsqueeze(-1)).double().sum())
        if reference is None:
            return
        log_q = functional.log_softmax(reference.float(), -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1, dtype=torch.float64)
        # Below zero only by rounding of the float32 logarithms.
        self._kl.append(kl.clamp_min(0).cpu())
        self._num_agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())

    @classmethod
    def merged(cls, parts: Iterable[Tally]) -> Tally:
        """The tally of everything that was added to `parts`."""
        whole = cls()
        for part in parts:
            whole.num_tokens += part.num_tokens
            whole._nll_sum += part._nll_sum
            whole._kl += part._kl
            whole._num_agreeing += part._num_agreeing
        return whole

    @property
    def bits(self) -> float:
        """The summed negative log likelihood in bits."""
        return self._nll_sum / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood; inf where that overflows."""
        mean = self._nll_sum / max(self.num_tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def kl_mean(self) -> float | None:
        """Mean KL(reference || model) per token in nats; None without a reference."""
        return float(torch.cat(self._kl).mean()) if self._kl else None

    @property
    def kl_p99(self) -> float | None:
        """The KL that 99 % of the tokens stay under, in nats; None without a reference."""
        # not torch's, which takes at most 2**24 values
        return float(np.quantile(torch.cat(self._kl).numpy(), 0.99)) if self._kl else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens whose most likely next token is the reference's; None without a reference."""
        return self._num_agreeing / self.num_tokens if self._kl else None


@dataclass(frozen=True)
class TallyRow:
    """The tokens of all windows that see at least `start` and fewer than `stop` tokens before them."""

    start: int
    stop: int
    tokens: int
    ppl: float
    kl: float | None
    kl_p99: float | None
    top1_agreement: float | None


class PositionTally:
    """A tally for each range of context lengths, [1, 32), [32, 64), [64, 128) ... up to the window's length.

    What a model loses over long context shows in the last rows, where the mean over a window hides it.
    """

    def __init__(self, context: int) -> None:
        starts, stop = [1], FIRST_RANGE
        while stop < context:
            starts.append(stop)
            stop *= 2
        self._ranges = list(zip(starts, [*starts[1:], context], strict=True))
        self._tallies = [Tally() for _ in self._ranges]

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a whole window: logits and reference [context - 1, vocab], targets [context - 1] int64."""
        if len(targets) != self._ranges[-1][1] - 1:
            raise ValueError(f"targets: got {len(targets)}, need {self._ranges[-1][1] - 1}, a whole window's")
        for (start, stop), tally in zip(self._ranges, self._tallies, strict=True):
            rows = slice(start - 1, stop - 1)  # row i predicts from i + 1 tokens
            tally.add(logits[rows], targets[rows], None if reference is None else reference[rows])

    def total(self) -> Tally:
        """Over all positions."""
        return Tally.merged(self._tallies)

    def rows(self) -> list[TallyRow]:
        """One for each range, shortest context first."""
        return [
            TallyRow(*bounds, t.num_tokens, t.perplexity, t.kl_mean, t.kl_p99, t.top1_agreement)
            for bounds, t in zip(self._ranges, self._tallies, strict=True)
        ]
