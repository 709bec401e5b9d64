"""How good a model is: perplexity and distance from a reference on a text, tasks, retrieval from long contexts."""

from rosaq.evaluation.generate import continue_text
from rosaq.evaluation.metrics import PositionTally, Tally, TallyRow
from rosaq.evaluation.passkey import PasskeyResult, find_passkeys
from rosaq.evaluation.score import EvalResult, evaluate, evaluation_windows
from rosaq.evaluation.subject import Subject, load_model, load_subject, load_tokenizer
from rosaq.evaluation.tasks import TaskResult, check_tasks, run_tasks

__all__ = [
    "EvalResult",
    "PasskeyResult",
    "PositionTally",
    "Subject",
    "Tally",
    "TallyRow",
    "TaskResult",
    "check_tasks",
    "continue_text",
    "evaluate",
    "evaluation_windows",
    "find_passkeys",
    "load_model",
    "load_subject",
    "load_tokenizer",
    "run_tasks",
]
