"""How a checkpoint is made: the choices of a recipe, as plain values. Nothing here computes."""

from rosaq.specs.recipe import HEAD_IN_16_BITS, Recipe
from rosaq.specs.weights import QuantSpec, RotationSpec, RowSpec, SalientSpec
from rosaq.specs.work import STRATEGIES, BudgetSpec, CalibrationSpec, ImportanceSpec, TuneSpec

__all__ = [
    "BudgetSpec",
    "CalibrationSpec",
    "HEAD_IN_16_BITS",
    "ImportanceSpec",
    "QuantSpec",
    "Recipe",
    "RotationSpec",
    "RowSpec",
    "STRATEGIES",
    "SalientSpec",
    "TuneSpec",
]
