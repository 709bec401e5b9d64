"""Block-wise tuning: what a quantised block stores is moved until its output is the dense block's."""

from rosaq.tuning.block import TunedBlock, TuningTokens, tune_block
from rosaq.tuning.linear import TunedLinear

__all__ = ["TunedBlock", "TunedLinear", "TuningTokens", "tune_block"]
