"""`rosaq eval`: perplexity and KL on a text, downstream tasks, passkey retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rosaq.cli.options import Device, Documents, JsonFile
from rosaq.evaluation import (
    PasskeyResult,
    check_tasks,
    evaluate,
    evaluation_windows,
    find_passkeys,
    load_subject,
    run_tasks,
)
from rosaq.report.console import wide_console
from rosaq.report.progress import count_progress
from rosaq.report.record import write_record
from rosaq.report.tables import eval_table, passkey_table, position_table, tasks_table


def eval_command(
    model: Annotated[str, typer.Argument(help="A directory (dense or rosaq) or a hub id.")],
    text: Annotated[Path | None, typer.Option(help="Text or JSON lines. Default: built-in prose.")] = None,
    documents: Documents = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens per window; may be repeated. Default: 512.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of each context, one after the other.")] = 20,
    reference: Annotated[str | None, typer.Option(help="Model to compare distributions with.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="A table by position within the window.")] = False,
    passkey: Annotated[str | None, typer.Option(help="Prompt lengths, as 2048,4096: find a hidden number.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, as piqa,arc_easy: need rosaq\\[tasks].")] = None,
    task_path: Annotated[Path | None, typer.Option(help="Directory of your own lm-eval task files.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Questions per task. Default: all.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. Default: float32; bfloat16 if quantised, on a GPU."),
    ] = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity, KL divergence to a reference model, downstream tasks and passkey retrieval."""
    request: dict[str, Any] = {"text": text, "documents": documents, "windows": windows}
    contexts, lengths = context or [512], _lengths(passkey)
    names = [] if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if tasks is not None:
        check_tasks(names, task_path)
    for option, value in (("task_limit", task_limit), ("task_path", task_path)):
        if value is not None and tasks is None:
            raise ValueError(f"{option}: got {value} without tasks, need both")
    if task_limit is not None and task_limit < 1:
        raise ValueError(f"task_limit: got {task_limit}, need at least 1")
    subject = load_subject(model, dtype, device=device)
    for option, values in (("context", contexts), ("passkey", lengths)):
        for value in values:  # all of them before the first run, which may take an hour
            subject.check_length(option, value)
    evaluation_windows(subject, **request, context=max(contexts))  # likewise: is the text long enough for all of them?
    other = load_subject(reference, dtype, device=device) if reference is not None else None
    asked = request | {"model": model, "context": contexts[0] if len(contexts) == 1 else contexts}
    asked |= {
        "reference": reference,
        "dtype": subject.dtype,
        "device": device,
        "passkey": lengths,
        "tasks": names,
        "task_limit": task_limit,
    }
    console, results, others = wide_console(), list[Any](), dict[str, Any]()

    def record() -> None:  # after every stage: a later one may fail after hours
        if json_file:
            write_record(json_file, "eval", asked, results[0] if len(results) == 1 else results, **others)

    for length in contexts:
        with count_progress("evaluating", f"windows of {length}") as progress:
            result = evaluate(subject, context=length, reference=other, progress=progress, **request)
        results.append(result.to_dict())
        record()
    console.print(eval_table(results))
    if positions:
        for row in results:
            console.print(position_table(row))
    if lengths:
        others["passkey"] = [_passkeys(subject, length).to_dict() for length in lengths]
        console.print(passkey_table(others["passkey"]))
        record()
    if tasks is not None:
        found = run_tasks(subject, names, include_path=task_path, limit=task_limit)
        others["tasks"] = [task.to_dict() for task in found]
        console.print(tasks_table(others["tasks"]))
        record()


def _passkeys(subject: Any, length: int) -> PasskeyResult:
    with count_progress("passkeys", f"prompts of {length}") as progress:
        return find_passkeys(subject, length=length, progress=progress)


def _lengths(spec: str | None) -> list[int]:
    """[2048, 4096] of "2048,4096"."""
    parts = [] if spec is None else spec.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"passkey: got {spec!r}, need lengths in tokens, for example 2048,4096")
    return [int(part) for part in parts]
