"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write request, result and environment here.")]
Documents = Annotated[str | None, typer.Option(help="START:STOP, the part of the documents to use.")]
