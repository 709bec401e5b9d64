"""What is decided before the first block is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from rosaq.calibrate import BlockModel
from rosaq.config import LinearFormat
from rosaq.pipeline.block import formats
from rosaq.pipeline.budget import Choices
from rosaq.pipeline.rotations import Rotations
from rosaq.specs import Recipe


@dataclass(frozen=True)
class Plan:
    """Recipe, rotations, and the width and number of directions of every site of every block."""

    model: BlockModel
    recipe: Recipe
    rotations: Rotations
    choices: Choices

    def formats(self, index: int) -> dict[str, LinearFormat]:
        """Of every linear of block `index`, by its path inside the block."""
        return formats(self.recipe, self.model, self.rotations.of_block(index), self.choices[index])
