"""What is decided before the first block is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from rosaq.calibrate import BlockModel
from rosaq.config import LinearFormat
from rosaq.pipeline.block import formats
from rosaq.pipeline.budget import Choices, SiteChoice
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site import SitePlan
from rosaq.specs import Recipe


@dataclass(frozen=True)
class Plan:
    """Recipe, rotations, and the width, directions and groups of every site of every block."""

    model: BlockModel
    recipe: Recipe
    rotations: Rotations
    choices: Choices

    def formats(self, index: int) -> dict[str, LinearFormat]:
        """Of every linear of block `index`, by its path inside the block."""
        return formats(self.recipe, self.model, self.rotations.of_block(index), self.choices[index])

    @property
    def unties_head(self) -> bool:
        """True where the head cannot be the embedding: the last norm's gain is folded into it, because the residual
        stream is rotated, or it has codes, while the embedding stays in 16 bits."""
        return self.rotations.residual is not None or self.recipe.quantizes_head

    @property
    def head(self) -> SitePlan | None:
        """Of the output head; None where it stays in 16 bits. A budget does not reach it: its width is its own."""
        if not self.recipe.quantizes_head:
            return None
        recipe, site = self.recipe, self.model.family.head_site
        count = recipe.most_salient_at(site.reads)
        if not recipe.budget.is_fixed:  # what no block keeps is mixed, and is no principal axis any more
            count = min(count, self.num_kept_axes)
        choice = SiteChoice(recipe.head_bits, count, recipe.quant.group_size)
        return SitePlan(site, recipe, choice, self.rotations.online.get(site.name))

    @property
    def num_kept_axes(self) -> int:
        """How many of the residual stream's leading channels any site of a block keeps in 16 bits."""
        sites = [site.name for site in self.model.family.sites_reading("residual")]
        return max((block[name].num_salient for block in self.choices for name in sites), default=0)

    def head_format(self) -> LinearFormat | None:
        """What the head stores; None where it stays in 16 bits."""
        return None if self.head is None else self.head.format(self.model.sizes.hidden)
