"""Progress bars on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from rosaq.pipeline import ProgressEvent

STAGES = {
    "axes": "finding axes",
    "fit": "fitting axes",
    "blocks": "quantising",
    "tuning": "tuning",
    "head": "head",
    "write": "writing",
}


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def quantize_progress() -> Iterator[Callable[[ProgressEvent], None]]:
    """A callback for `rosaq.quantize`: one line per stage with block, layer error (mean SQNR in dB) and time left."""
    with _bar() as progress:
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                name = STAGES.get(event.stage, event.stage)
                tasks[event.stage] = progress.add_task(name, total=event.num_blocks, note="")
            note = "" if event.error_db is None else f"SQNR {event.error_db:.1f} dB"
            done = min(event.block + 1, event.num_blocks)
            progress.update(tasks[event.stage], completed=done, note=note)

        yield show


@contextmanager
def count_progress(name: str, note: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) for `rosaq.evaluate`, `rosaq.verify` and `rosaq.convert`."""
    with _bar() as progress:
        tasks: list[TaskID] = []

        def show(done: int, total: int) -> None:
            # Not before: a bar above an error message would say that work had begun.
            if not tasks:
                tasks.append(progress.add_task(name, note=note))
            progress.update(tasks[0], completed=done, total=total)

        yield show
