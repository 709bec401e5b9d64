"""Tuning: what is stored is moved until a block's output, and then the model's predictions, are the dense model's."""

from rosaq.tuning.block import Sequences, TunedBlock, TuningTokens, tune_block
from rosaq.tuning.linear import TunedLinear
from rosaq.tuning.model import Predictions, tune_model

__all__ = ["Predictions", "Sequences", "TunedBlock", "TunedLinear", "TuningTokens", "tune_block", "tune_model"]
