"""What several commands share: options, and the text they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rosaq.text import builtin_text, read_text, select_documents

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write request, result and environment here.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N: what computes.")]
Documents = Annotated[str | None, typer.Option(help="START:STOP, the part of the documents to use.")]


def calibration_documents(path: Path | None, documents: str | None) -> list[str]:
    """The documents of a file, or the built-in prose, cut to the part "START:STOP"."""
    return select_documents(read_text(path) if path else builtin_text("calibration"), documents)
