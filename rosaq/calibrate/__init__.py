"""Activations of a model on calibration text, one block at a time, and their second moments."""

from rosaq.calibrate.blocks import BlockModel, SiteInput
from rosaq.calibrate.gram import Gram, Tokens
from rosaq.calibrate.importance import importance_from_scores, importance_summary, token_importance
from rosaq.calibrate.sensitivity import BLOCK, output_sensitivity

__all__ = [
    "BLOCK",
    "BlockModel",
    "Gram",
    "SiteInput",
    "Tokens",
    "importance_from_scores",
    "importance_summary",
    "output_sensitivity",
    "token_importance",
]
