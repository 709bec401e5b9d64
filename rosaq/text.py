"""Text for calibration and evaluation: documents from a file or from Python itself, cut into windows of tokens."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from torch import Tensor

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")  # C4 calls its own JSON lines .json
SEPARATOR = "\n\n"


def read_text(path: str | Path) -> list[str]:
    """The documents of a file: one {"text": ...} a line in .jsonl, .ndjson and .json, else the whole file is one.

    Errors: FileNotFoundError; ValueError for an empty file, for bytes that are not UTF-8 (with their offset) and
    for a JSON line without a string under "text" (with its number).
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path's own raises where a name is too long, as a text in its place is
        raise FileNotFoundError(
            f"{str(path)[:200]}: got no such file, need a text or JSON lines file, or a list of documents"
        )
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got a byte that is not UTF-8 at offset {error.start}, need UTF-8 text") from error
    documents = _json_lines(path, content) if path.suffix.lower() in JSON_LINES_SUFFIXES else [content]
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path}: got no text ({len(content)} characters), need at least one document")
    return documents


def _json_lines(path: Path, content: str) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold U+2028 and friends unescaped, which are no line ends of the file.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: got {error}, need a JSON object") from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise ValueError(f'{path}: line {number}: got {line[:60]!r}, need {{"text": "..."}}')
        documents.append(value["text"])
    return documents


def builtin_text(half: Literal["calibration", "evaluation"]) -> list[str]:
    """English prose that every Python carries (its own manual), in two halves that share no paragraph.

    Enough to try things without a download; for numbers to report, give real text. It differs a little between
    Python versions, so compare results from one version only.
    """
    if half not in ("calibration", "evaluation"):
        raise ValueError(f"half: got {half!r}, need 'calibration' or 'evaluation'")
    halves: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    sizes = dict.fromkeys(halves, 0)
    seen: set[str] = set()
    # Longest first into the smaller half, counting only what is new: topics repeat each other's sections.
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = list(dict.fromkeys(p.strip("\n") for p in text.split(SEPARATOR)))
        fresh = [p for p in paragraphs if p.strip() and p.strip() not in seen]
        seen.update(p.strip() for p in fresh)
        target = min(halves, key=lambda name: (sizes[name], name))
        if fresh:
            halves[target].append(SEPARATOR.join(fresh))
            sizes[target] += len(halves[target][-1])
    return halves[half]


def parse_documents(spec: str) -> slice:
    """The slice "START:STOP" of a list of documents ("0:1500", "1500:", ":20"); ValueError for anything else."""
    start, colon, stop = spec.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
        raise ValueError(f"documents: got {spec!r}, need START:STOP, for example 0:1500")
    return slice(int(start) if start else None, int(stop) if stop else None)


def select_documents(documents: Sequence[str], spec: str | None) -> list[str]:
    """`documents[START:STOP]` (all of them where `spec` is None); ValueError if nothing is left."""
    chosen = list(documents[parse_documents(spec)] if spec is not None else documents)
    if not chosen:
        raise ValueError(f"documents: got {spec!r} of {len(documents)} documents, need a range that holds some")
    return chosen


def token_windows(tokenizer: Any, documents: Sequence[str], num: int, length: int, seed: int | None) -> Tensor:
    """`num` windows of `length` tokens, int64 [num, length], out of the documents joined by blank lines.

    With a `seed`: windows that start anywhere (calibration); where they would take more than a quarter of the text, no
    two of them overlap. With None: windows that do not overlap, from the start (evaluation). No BOS or other special
    token is added. A warning where windows must overlap; ValueError if there is not one (for evaluation: not all), and
    for a single str, which would be a document for each of its characters.
    """
    if isinstance(documents, str):
        raise ValueError(f"documents: got the str {documents[:60]!r}, need a list of documents")
    for name, value in (("num", num), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    tokens = tokenizer(SEPARATOR.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    needed = length if seed is not None else num * length
    if len(tokens) < needed:
        raise ValueError(
            f"text: got {len(tokens)} tokens in {len(documents)} documents, need {needed} for {num} windows of {length}"
        )
    if num * length > len(tokens):
        warnings.warn(
            f"text: got {len(tokens)} tokens for {num} windows of {length}, which overlap: what is tuned on them is "
            f"learnt by heart; need {num * length} or more",
            UserWarning,
            stacklevel=2,
        )
    stream = torch.tensor(tokens, dtype=torch.int64)
    if seed is None:
        return stream[:needed].view(num, length)
    starts = _starts(len(tokens), num, length, torch.Generator().manual_seed(seed))
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def _starts(total: int, num: int, length: int, generator: torch.Generator) -> Tensor:
    """Where `num` windows of `length` out of `total` tokens start, int64 [num], in random order."""
    spare = total - num * length
    if spare < 0 or 4 * num * length <= total:
        return torch.randint(total - length + 1, (num,), generator=generator)
    # Windows drawn one by one would see 63 % of a text of their own size, and the rest of it never.
    gaps = torch.randint(spare + 1, (num,), generator=generator).sort().values
    return (gaps + length * torch.arange(num))[torch.randperm(num, generator=generator)]
