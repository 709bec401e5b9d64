"""Weights to codes: pure functions of tensors that know no model."""

from rosaq.quantizers.gptq import NotPositiveDefiniteError, damped_copies, damping_term, gptq, inverse_factor
from rosaq.quantizers.grid import Grid, fit_grid
from rosaq.quantizers.quantize import quantize_in_axes, quantize_weight, quantize_with_basis
from rosaq.quantizers.row_feedback import RowFeedback
from rosaq.quantizers.rtn import rtn
from rosaq.quantizers.salient import energy_index

__all__ = [
    "Grid",
    "NotPositiveDefiniteError",
    "RowFeedback",
    "damped_copies",
    "damping_term",
    "energy_index",
    "fit_grid",
    "gptq",
    "inverse_factor",
    "quantize_in_axes",
    "quantize_weight",
    "quantize_with_basis",
    "rtn",
]
