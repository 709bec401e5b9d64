"""A directory that appears under its name when everything in it is written, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(output: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty sibling of `output` to write into; it takes output's place at the end, and vanishes on an error.

    ValueError where `output` is a file, or a directory with something in it and `force` is not set.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: got {output}, which is a file, need a directory name")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ValueError(f"output: got {output}, which exists and is not empty, need a new name or force (--force)")
    partial = output.parent / f".{output.name}.writing"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
