"""A directory that appears under its name when everything in it is written, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(output: str | Path, *, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Give an empty sibling of `output` to write into; it takes output's place at the end, and vanishes on an error.

    ValueError as in `check_output`, before anything is written.
    """
    output = check_output(output, force=force, source=source)
    partial = output.parent / f".{output.name}.writing"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: str | Path, *, force: bool, source: Path | None = None) -> Path:
    """The path that `output` stands for, links resolved.

    ValueError where it is a file, a mount point, holds the working directory or the model `source`, or is a directory
    with something in it, unless that is a checkpoint and `force` is set.
    """
    path = Path(output).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output: got {output}, which is a file, need a directory name")
    if Path.cwd().is_relative_to(path):  # it would be deleted under the process and the shell
        raise ValueError(f"output: got {output}, which holds the working directory, need another directory")
    if source is not None and source.resolve().is_relative_to(path):
        raise ValueError(f"output: got {output}, which holds the source {source}, need another directory")
    if path.is_mount():
        raise ValueError(f"output: got {output}, a mount point, which cannot be renamed; need a directory inside it")
    is_full = path.is_dir() and any(path.iterdir())
    if is_full and not force:
        raise ValueError(f"output: got {output}, which exists and is not empty, need a new name or force (--force)")
    if is_full and not (path / "config.json").is_file():
        raise ValueError(f"output: got {output}, which holds no model, need a new name: force replaces models only")
    return path


def put_in_place(new: Path, output: Path) -> None:
    """Rename `new` to its sibling `output`. An earlier `output` is deleted once that is done, and put back on an
    error."""
    if not output.exists():
        new.rename(output)
        return
    # A name of its own: what a crash left under an earlier one may be the only copy of something.
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    earlier = aside / output.name
    try:
        output.rename(earlier)
        new.rename(output)
    except BaseException:
        if earlier.exists():
            earlier.rename(output)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
