"""One sweep of a few sequences through the dense, rotated model and back, and what a run keeps of it: widths and
numbers of directions for the budget, second moments of the gradients for feedback between rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import groupby

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, SiteGradients
from rosaq.pipeline.budget import Choices, SiteChoice, share_out
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.output_moments import OutputMoments
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site_facts import SiteMeter
from rosaq.pipeline.workspace import Workspace
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
_CHOICES = "choices"


class Sweep:
    """What `recipe` wants of the sweep, and the steps of the run that hold it."""

    def __init__(self, recipe: Recipe, model: BlockModel, work: Workspace) -> None:
        self._recipe, self._model, self._work = recipe, model, work

    @property
    def sequences(self) -> int:
        """That go through the model; 0 where the recipe asks for nothing."""
        budget, rows = self._recipe.budget, self._recipe.rows
        return max(0 if budget.is_fixed else budget.sequences, rows.sequences if self._recipe.has_row_feedback else 0)

    @property
    def is_due(self) -> bool:
        """True until all that is wanted is saved."""
        last = _moments_name(0) if self._recipe.budget.is_fixed else _CHOICES
        return bool(self.sequences) and self._work.load(last) is None

    def keep(
        self, found: Iterable[SiteGradients], rotations: Rotations, rotated: Callable[[int], Tensors], num_tokens: int
    ) -> None:
        """Go through `found`, from the last block to the first, and save what is wanted of it. rotated(i): the weights
        of block i, folded and rotated. num_tokens: that went through the model."""
        facts, recipe = [], self._recipe
        held = torch.bfloat16 if self._model.is_bf16 else torch.float32
        for index, parts in groupby(found, key=lambda part: part.index):
            meter = SiteMeter(self._model, recipe, rotations, index)
            moments = OutputMoments(self._model.family.block_prefix(index), recipe.quant.damping, held)
            for part in parts:
                if not recipe.budget.is_fixed:
                    meter.add(part)
                if recipe.rows.is_at(part.site.stage):
                    moments.add(part)
            if not recipe.budget.is_fixed:
                facts.append(meter.facts(rotated(index), num_tokens))
            if recipe.has_row_feedback:
                self._work.save(_moments_name(index), moments.moments(), {})
            release_freed_memory()
        if not recipe.budget.is_fixed:
            shared = share_out(facts[::-1], recipe.budget, recipe.quant)
            sites = self._model.family.sites  # experts of a block share theirs
            rows = [[asdict(block[site.stage]) for site in sites] for block in shared]
            self._work.save(_CHOICES, {}, {_CHOICES: rows})

    def choices(self) -> Choices | None:
        """What the budget gives every site, as saved (by every rank, since two GPUs need not find the same); None for a
        recipe without one."""
        saved = None if self._recipe.budget.is_fixed else self._work.load(_CHOICES)
        if saved is None:
            return None
        names = [site.name for site in self._model.family.sites]
        return [dict(zip(names, (SiteChoice(**c) for c in block), strict=True)) for block in saved[1][_CHOICES]]

    def output_moments(self, index: int, mixing: Tensor | None) -> Tensors:
        """{linear: H [n, n] float64} of block `index`, for feedback between its rows; empty for a recipe without.
        mixing [d, d]: from the residual stream of the sweep to the one that H is wanted in, None if they are one."""
        saved = self._work.load(_moments_name(index)) if self._recipe.has_row_feedback else None
        found = {} if saved is None else {name: h.double() for name, h in saved[0].items()}
        if mixing is not None:
            found |= {n: mixing.T @ h @ mixing for n, h in found.items() if n in self._model.family.writers}
        return found


def _moments_name(index: int) -> str:
    """Name of the saved moments of block `index`."""
    return f"outputs-{index:05d}"
