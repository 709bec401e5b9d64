"""How good a model is: perplexity on a text, and how far its next-token distribution is from a reference model's."""

from rosaq.evaluation.generate import continue_text
from rosaq.evaluation.metrics import Tally
from rosaq.evaluation.score import EvalResult, evaluate, load_model, load_tokenizer

__all__ = ["EvalResult", "Tally", "continue_text", "evaluate", "load_model", "load_tokenizer"]
