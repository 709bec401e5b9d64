"""`rosaq verify DIR`: each check in turn, as far as the ones before it leave something to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from rosaq.checkpoint import (
    HASHES_FILE,
    WeightReader,
    file_hash,
    linear_sizes,
    model_directory,
    read_config,
    read_hashes,
    read_json,
)
from rosaq.config import CheckpointConfig
from rosaq.verification.linears import SAME_RESULT, read_linear, result_error, value_problem

Status = Literal["ok", "failed", "unknown"]
Progress = Callable[[int, int], None]
Sizes = dict[str, tuple[int, int]]


class Check(NamedTuple):
    """One row of the table. status "unknown": nothing to compare with, which is no failure."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`."""

    checks: list[Check]

    @property
    def is_sound(self) -> bool:
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"is_sound": self.is_sound, "checks": [check._asdict() for check in self.checks]}


def verify(directory: str | Path, *, sample: int = 8, progress: Progress | None = None) -> Verdict:
    """Check the checkpoint in `directory`, reading every tensor once, one linear in memory.

    sample    how many linears (spread over the model) are run and compared with the float64 reference.
    progress  called with (linears done, linears in all).

    A hub name is downloaded first. What is wrong with the checkpoint is a failed check, never an exception;
    FileNotFoundError where there is neither directory nor repository, ValueError for a negative sample.
    """
    if sample < 0:
        raise ValueError(f"sample: got {sample}, need 0 or more")
    directory = model_directory(directory, "directory")
    return Verdict(list(_checks(directory, sample, progress or (lambda _done, _total: None))))


def _checks(directory: Path, sample: int, progress: Progress) -> Iterator[Check]:
    try:
        config = read_config(directory)
    except (ValueError, OSError) as error:
        yield Check("config", "failed", str(error))
        return
    yield Check("config", "ok", f"format version {config.version}, recipe {config.recipe or 'not named'}")
    yield _check_hashes(directory)
    try:
        reader = WeightReader(directory)
        yield Check("files", "ok", f"{len(reader.names())} tensors, sizes as the headers say")
        sizes = linear_sizes(config, reader)
    except (ValueError, OSError) as error:
        yield Check("tensors", "failed", str(error))
        return
    if not sizes:
        yield Check("tensors", "failed", "got no quantised linear, need tensors named *.qweight")
        return
    yield Check("tensors", "ok", f"{len(sizes)} quantised linears, shapes and dtypes as config.json says")
    yield from _check_model(directory, config, reader, sizes)
    yield from _check_numbers(config, reader, sizes, sample, progress)


def _check_hashes(directory: Path) -> Check:
    if not (directory / HASHES_FILE).is_file():
        return Check("hashes", "unknown", f"no {HASHES_FILE}")
    try:
        hashes = read_hashes(directory)
    except ValueError as error:
        return Check("hashes", "failed", str(error))
    for name, digest in hashes.items():
        path = directory / name
        if not path.is_file():
            return Check("hashes", "failed", f"{name}: got no such file, need it by {HASHES_FILE}")
        if file_hash(path) != digest:
            return Check("hashes", "failed", f"{name}: got other bytes than {HASHES_FILE} was written for")
    unlisted = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in hashes)
    if unlisted:
        return Check("hashes", "failed", f"{unlisted[0]}: got a file that {HASHES_FILE} does not list")
    return Check("hashes", "ok", f"{len(hashes)} files")


def _check_model(directory: Path, config: CheckpointConfig, reader: WeightReader, sizes: Sizes) -> Iterator[Check]:
    """The checkpoint against the model that config.json describes: every tensor of it, and no other."""
    # transformers is only needed here, and slow to import.
    from rosaq.integrations.transformers_model import ModelShape, check_untied, dense_model

    try:
        model = dense_model(read_json(directory / "config.json"))
        check_untied(model, sizes)
        shape = ModelShape.of(model, config)
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises about config.json, that is not sound
        yield Check("model", "failed", str(error) or repr(error))
        return
    missing = sorted(shape.needed - set(reader.names()))
    unknown = sorted(set(reader.names()) - shape.known)
    wrong = [
        f"{name}: got {list(sizes[name])}, need {list(size)}"
        for name, size in shape.linears.items()
        if name in sizes and sizes[name] != size
    ]
    for found, what in ((missing, "no such tensor, need it"), (unknown, "a tensor the model has no place for")):
        wrong += [f"{name}: got {what}" for name in found]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Check("model", "failed", wrong[0] + more)
        return
    yield Check("model", "ok", f"{shape.name}: every tensor is there")
    possible = shape.rank_counts(config)
    if not possible:
        yield Check("tensor parallel", "unknown", "transformers has no plan for this model")
    elif config.tp_sizes and config.tp_sizes != possible:
        told = f"tp_sizes: got {list(config.tp_sizes)}, need {list(possible)}"
        yield Check("tensor parallel", "failed", told)
    else:
        yield Check("tensor parallel", "ok", f"sizes {', '.join(map(str, possible))}")


def _check_numbers(
    config: CheckpointConfig, reader: WeightReader, sizes: Sizes, sample: int, progress: Progress
) -> Iterator[Check]:
    names = sorted(sizes)
    sampled = {names[i * len(names) // sample] for i in range(sample)} if sample else set()
    worst, worst_name = 0.0, ""
    for done, name in enumerate(names):
        progress(done, len(names))
        fmt, (_, k) = config.format_of(name), sizes[name]
        tensors = read_linear(reader, name, fmt, sizes[name])
        problem = value_problem(tensors, fmt, k)
        if problem is not None:
            yield Check("numbers", "failed", f"{name}.{problem}")
            return
        if name in sampled:
            error = result_error(tensors, fmt, k, name)
            if not error <= worst and not math.isnan(worst):  # no number is worse than any
                worst, worst_name = error, name
    progress(len(names), len(names))
    for name in reader.names():
        if name.rpartition(".")[0] in sizes and not name.endswith(".bias"):
            continue
        tensor = reader.get(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield Check("numbers", "failed", f"{name}: got NaN or Inf, need finite numbers")
            return
    yield Check("numbers", "ok", "finite; rotations orthogonal; salient columns at their zero point")
    if sampled:
        status: Status = "ok" if worst <= SAME_RESULT else "failed"
        detail = f"{len(sampled)} linears, worst relative error {worst:.1e} ({worst_name}), limit {SAME_RESULT:.1e}"
        yield Check("results", status, detail)
