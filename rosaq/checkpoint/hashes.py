"""SHA256SUMS: the hash of every file of a checkpoint, in the form that `sha256sum -c SHA256SUMS` reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

HASHES_FILE = "SHA256SUMS"


def file_hash(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()  # not file_digest, which Python 3.10 lacks
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_hashes(directory: str | Path) -> None:
    """Write HASHES_FILE for every other file in `directory`; to be done last."""
    directory = Path(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != HASHES_FILE)
    lines = [f"{file_hash(path)}  {path.name}\n" for path in files]
    (directory / HASHES_FILE).write_text("".join(lines), encoding="utf-8")


def read_hashes(directory: str | Path) -> dict[str, str]:
    """{file name: hash}; ValueError naming the line that is not `HASH  NAME` with a plain file name."""
    path = Path(directory) / HASHES_FILE
    hashes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).name != name:
            raise ValueError(f"{path}: line {number}: got {line!r}, need a SHA-256, two spaces and a plain file name")
        hashes[name] = digest
    return hashes
