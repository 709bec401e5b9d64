"""Activations of a model on calibration text, one block at a time, and their second moments."""

from rosaq.calibrate.blocks import BlockModel, BlockPass, SiteInput
from rosaq.calibrate.gram import Gram, Tokens, naming
from rosaq.calibrate.importance import importance_from_scores, importance_summary, token_importance
from rosaq.calibrate.ranks import (
    average_gradients,
    is_first_rank,
    mean_over_ranks,
    num_ranks,
    own_share,
    sum_over_ranks,
    wait_for_all,
)
from rosaq.calibrate.sensitivity import SiteGradients, drawn_labels, site_gradients

__all__ = [
    "BlockModel",
    "BlockPass",
    "Gram",
    "SiteGradients",
    "SiteInput",
    "Tokens",
    "average_gradients",
    "drawn_labels",
    "importance_from_scores",
    "importance_summary",
    "is_first_rank",
    "mean_over_ranks",
    "naming",
    "num_ranks",
    "own_share",
    "site_gradients",
    "sum_over_ranks",
    "wait_for_all",
    "token_importance",
]
