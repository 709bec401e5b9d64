"""One sweep of a few sequences through the dense, rotated model and back, and what a run keeps of it: widths and
numbers of directions for the budget, second moments of the gradients for feedback between rows, and what errors cost
for rotations that are fitted to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import groupby

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, SiteGradients
from rosaq.pipeline.budget import Choices, SiteChoice, SiteFacts, same_everywhere, share_out
from rosaq.pipeline.fitting import Costs
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.output_moments import OutputMoments, in_other_basis
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site_facts import SiteMeter
from rosaq.pipeline.workspace import Workspace
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
_CHOICES, _LOSSES = "choices", "losses"


class Sweep:
    """What `recipe` wants of the sweep, and the steps of the run that hold it."""

    def __init__(self, recipe: Recipe, model: BlockModel, work: Workspace) -> None:
        self._recipe, self._model, self._work = recipe, model, work
        self._has_facts = not recipe.budget.is_fixed or recipe.rotation.is_fitted

    @property
    def sequences(self) -> int:
        """That go through the model; 0 where the recipe asks for nothing."""
        budget, rows = self._recipe.budget, self._recipe.rows
        return max(budget.sequences if self._has_facts else 0, rows.sequences if self._recipe.has_row_feedback else 0)

    @property
    def is_due(self) -> bool:
        """True until all that is wanted is saved."""
        last = _CHOICES if self._has_facts else _moments_name(0)
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
                if self._has_facts:
                    meter.add(part)
                if recipe.rows.is_at(part.site.stage):
                    moments.add(part)
            if self._has_facts:
                facts.append(meter.facts(rotated(index), num_tokens))
                self._work.save(_costs_name(index), meter.costs_of_rows(num_tokens), {})
            if recipe.has_row_feedback:
                self._work.save(_moments_name(index), moments.moments(), {})
            release_freed_memory()
        if self._has_facts:
            self._save_choices(facts[::-1])

    def _save_choices(self, facts: list[dict[str, SiteFacts]]) -> None:
        sites, budget = self._model.family.sites, self._recipe.budget  # experts of a block share theirs
        if budget.is_fixed:
            own = same_everywhere(self._recipe, self._model.family, len(facts))
            shared = [{site.stage: block[site.name] for site in sites} for block in own]
        else:
            shared = share_out(facts, budget, self._recipe.quant)
        losses = [{s: f.loss(chosen[s]) for s, f in block.items()} for block, chosen in zip(facts, shared, strict=True)]
        total = sum(sum(block.values()) for block in losses)
        shares = [{s: float(f"{loss / total:.2e}") if total else 0.0 for s, loss in block.items()} for block in losses]
        rows = [[asdict(block[site.stage]) for site in sites] for block in shared]
        self._work.save(_CHOICES, {}, {_CHOICES: rows, _LOSSES: shares})

    def choices(self) -> Choices | None:
        """What the budget gives every site, as saved (by every rank, since two GPUs need not find the same); None for a
        recipe without one."""
        saved = None if self._recipe.budget.is_fixed else self._work.load(_CHOICES)
        if saved is None:
            return None
        names = [site.name for site in self._model.family.sites]
        return [dict(zip(names, (SiteChoice(**c) for c in block), strict=True)) for block in saved[1][_CHOICES]]

    def costs(self) -> Costs:
        """What errors cost, for a recipe whose rotations are fitted."""
        saved = self._work.load(_CHOICES)
        assert saved is not None

        def of_rows(index: int) -> Tensors:
            found = self._work.load(_costs_name(index))
            assert found is not None
            return found[0]

        return Costs(of_rows, saved[1][_LOSSES])

    def output_moments(self, index: int, swept: Rotations, now: Rotations) -> Tensors:
        """{linear: H [n, n] float64} of block `index`, for feedback between its rows; empty for a recipe without.
        swept: the rotations of the sweep; now: those in whose bases H is wanted."""
        saved = self._work.load(_moments_name(index)) if self._recipe.has_row_feedback else None
        if saved is None:
            return {}
        return in_other_basis(saved[0], self._model.family, swept.of_block(index), now.of_block(index))


def _moments_name(index: int) -> str:
    """Name of the saved moments of block `index`."""
    return f"outputs-{index:05d}"


def _costs_name(index: int) -> str:
    """Name of what errors at the rows of block `index` cost."""
    return f"costs-{index:05d}"
