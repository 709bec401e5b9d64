"""Downstream tasks through lm-eval, the optional extra `tasks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rosaq.evaluation.subject import Model, load_subject

# The usual zero-shot set for quantised models.
COMMON_TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")


@dataclass(frozen=True)
class TaskResult:
    """One task's metrics as lm-eval names them, for example {"acc": 0.68, "acc_stderr": 0.01, "acc_norm": 0.70}.

    `version` is the task's own; `samples` the questions that were asked, `limit` the most that were asked for.
    """

    model: str
    task: str
    version: str
    num_fewshot: int | None
    samples: int
    limit: int | None
    metrics: dict[str, float]
    lm_eval: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
    device: str = "cpu",
    tokenizer: Any = None,
) -> list[TaskResult]:
    """Run lm-eval's `tasks` (names or groups) on `model`; one result per task, in alphabetical order.

    include_path   a directory of task definitions (YAML) of your own.
    num_fewshot    examples before each question; None for what the task says.
    limit          the first so many questions of each task; None for all.
    batch_size     requests per forward pass.
    dtype, device, tokenizer   as for `evaluate`.
    ValueError as from `check_tasks`. Most tasks' data comes from the hub, once.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    manager = check_tasks(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    subject = load_subject(model, dtype, tokenizer, device=device)
    adapter = HFLM(
        pretrained=subject.module,
        tokenizer=subject.tokenizer,
        batch_size=batch_size,
        softmax_dtype="float32",  # a sum of bfloat16 knows whole nats only
    )
    found = simple_evaluate(
        model=adapter,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,  # only for errors of metrics that are no mean, as perplexity
        log_samples=False,
    )
    return [
        TaskResult(
            model=subject.name,
            task=task,
            version=str(found["versions"].get(task)),
            num_fewshot=found["n-shot"].get(task),
            samples=found["n-samples"][task]["effective"],
            limit=limit,
            metrics=_metrics(values),
            lm_eval=version("lm_eval"),
        )
        for task, values in sorted(found["results"].items())
        if task in found["n-samples"]  # groups have none of their own
    ]


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """lm-eval's manager of the task files, if it knows all of `tasks`; before hours of anything else, say.

    ValueError without lm-eval and for names it does not know; FileNotFoundError where `include_path` is no directory.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: got {tasks!r}, need a list of names, for example {list(COMMON_TASKS[:2])}")
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path: got {str(include_path)!r}, need a directory of task definitions")
    for package in ("lm_eval", "accelerate"):  # the second is in lm-eval's own extra for models of transformers
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"tasks: got no {package} package, need: pip install 'rosaq[tasks]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    unknown = sorted(task for task in tasks if not manager.match_tasks([task]))
    if unknown:
        raise ValueError(f"tasks: got {unknown}, need names that lm-eval {version('lm_eval')} knows: lm-eval ls tasks")
    return manager


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" as "acc", "exact_match,strict-match" as "exact_match.strict-match"."""
    metrics = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if variant and isinstance(value, (int, float)):
            metrics[name if variant == "none" else f"{name}.{variant}"] = float(value)
    return metrics
