"""One sweep of a few sequences through the dense, rotated model and back, and what a run keeps of it: widths and
numbers of directions for the budget, gradients for feedback between rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Sensitivity
from rosaq.pipeline.budget import Choices, SiteChoice, share_out
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site_facts import site_facts
from rosaq.pipeline.workspace import Workspace
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
_CHOICES = "choices"


class Sweep:
    """What `recipe` wants of the sweep, and the steps of the run that hold it."""

    def __init__(self, recipe: Recipe, model: BlockModel, work: Workspace) -> None:
        self._recipe, self._model, self._work = recipe, model, work

    @property
    def measured(self) -> int:
        """Sequences that the sites are measured on."""
        return 0 if self._recipe.budget.is_fixed else self._recipe.budget.sequences

    @property
    def sequences(self) -> int:
        """That go through the model; 0 where the recipe asks for nothing."""
        return max(self.measured, self._recipe.rows.sequences if self._recipe.has_row_feedback else 0)

    @property
    def is_due(self) -> bool:
        """True until all that is wanted is saved."""
        last = _CHOICES if self.measured else _gradient_name(0)
        return bool(self.sequences) and self._work.load(last) is None

    def keep(self, found: Iterable[Sensitivity], rotations: Rotations, rotated: Callable[[int], Tensors]) -> None:
        """Go through `found`, from the last block to the first, and save what is wanted of it. rotated(i): the weights
        of block i, folded and rotated."""
        facts = []
        for each in found:
            if self.measured:
                facts.append(site_facts(each, self._model, self._recipe, rotations, rotated(each.index)))
            if self._recipe.has_row_feedback:
                gradient = each.gradient[: self._recipe.rows.sequences].to(torch.bfloat16)
                self._work.save(_gradient_name(each.index), {"gradient": gradient}, {})
            release_freed_memory()
        if self.measured:
            shared = share_out(facts[::-1], self._recipe.budget, self._recipe.quant)
            sites = self._model.family.sites  # experts of a block share theirs
            rows = [[asdict(block[site.stage]) for site in sites] for block in shared]
            self._work.save(_CHOICES, {}, {_CHOICES: rows})

    def choices(self) -> Choices | None:
        """What the budget gives every site, as saved (by every rank, since two GPUs need not find the same); None for a
        recipe without one."""
        saved = self._work.load(_CHOICES) if self.measured else None
        if saved is None:
            return None
        names = [site.name for site in self._model.family.sites]
        return [dict(zip(names, (SiteChoice(**c) for c in block), strict=True)) for block in saved[1][_CHOICES]]

    def gradient(self, index: int) -> Tensor | None:
        """Of the predictions at the output of block `index` [batch, length, d] bfloat16, in the stream as it was
        rotated for the sweep; None for a recipe without feedback between rows."""
        saved = self._work.load(_gradient_name(index)) if self._recipe.has_row_feedback else None
        return None if saved is None else saved[0]["gradient"]


def _gradient_name(index: int) -> str:
    """Name of the saved gradient at the output of block `index`."""
    return f"gradient-{index:05d}"
