"""`rosaq convert SOURCE -o OUT`: stream a checkpoint into another format, one linear and one shard in memory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosaq.checkpoint import (
    WeightReader,
    linear_sizes,
    new_directory,
    read_config,
    read_json,
    total_bytes,
    write_hashes,
    write_shards,
)
from rosaq.config import QUANT_METHOD, CheckpointConfig, LinearFormat
from rosaq.conversion.codes import to_rosaq
from rosaq.conversion.exporters import compressed, compressed_config, dense, in_range
from rosaq.conversion.importers import READERS, TENSORS, linear_names, read_linear
from rosaq.experts import name_on_disk

TARGETS = {"dense": dense, "compressed-tensors": compressed}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Progress = Callable[[int, int], None]
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "rosaq_layers.json", "quantize_config.json")


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source_format: str
    target_format: str
    num_linears: int
    source_bytes: int
    output_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Job:
    """One conversion; `formats` fills up while the tensors stream by."""

    source: Path
    reader: WeightReader
    values: dict[str, Any]
    dtype: torch.dtype
    progress: Progress
    formats: dict[str, LinearFormat] = field(default_factory=dict)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint in `source` to the new directory `output` in another format.

    From a rosaq checkpoint: to="dense" (default; weights of `dtype`, float16 where None, works anywhere) or
    "compressed-tensors" (the same codes; only without salient directions and online rotations; 3 bits need
    compressed-tensors 0.18 or newer).
    From GPTQ, AWQ (gemm) or compressed-tensors (pack-quantized) of 3 or 4 bits: to="rosaq", the same codes.

    ValueError for another format, target or dtype, for a dtype where the target is not "dense", and for tensors that
    the target has no place for, by name.
    """
    source, output = Path(source), Path(output)
    values = read_json(source / "config.json") if (source / "config.json").is_file() else None
    if values is None:
        raise FileNotFoundError(f"{source}/config.json: got no such file, need a model directory")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, need one of {sorted(DTYPES)}")
    method = str((values.get("quantization_config") or {}).get("quant_method", "dense"))
    possible = list(TARGETS) if method == QUANT_METHOD else [QUANT_METHOD] if method in READERS else []
    if not possible:
        raise ValueError(f"{source}: got a {method} checkpoint, need rosaq or one of {sorted(READERS)}")
    to = possible[0] if to is None else to
    if to not in possible:
        raise ValueError(f"to: got {to!r} for a {method} checkpoint, need one of {possible}")
    if dtype is not None and to != "dense":
        raise ValueError(f"dtype: got {dtype!r} for the target {to!r}, need none: only 'dense' has weights of a dtype")
    torch_dtype = DTYPES[dtype or "float16"]
    job = _Job(source, WeightReader(source), values, torch_dtype, progress or (lambda _done, _total: None))
    with new_directory(output, force=force, source=source) as directory:
        if to == QUANT_METHOD:
            _write(job, directory, _imported(job, method), lambda: _imported_config(job))
        else:
            config = read_config(source)
            _write(job, directory, _exported(job, config, to), lambda: _exported_config(job, config, to))
    return Conversion(method, to, len(job.formats), total_bytes(source), total_bytes(output))


def _write(
    job: _Job, directory: Path, tensors: Iterator[tuple[str, Tensor]], config: Callable[[], dict[str, Any]]
) -> None:
    write_shards(directory, tensors)
    for pattern in _COPIED:
        for path in job.source.glob(pattern):
            if path.name not in _NOT_COPIED:
                shutil.copy(path, directory / path.name)
    (directory / "config.json").write_text(json.dumps(config(), indent=2) + "\n", encoding="utf-8")
    write_hashes(directory)


def _exported(job: _Job, config: CheckpointConfig, to: str) -> Iterator[tuple[str, Tensor]]:
    sizes, model_type = linear_sizes(config, job.reader), str(job.values.get("model_type"))
    for done, (name, (n, k)) in enumerate(sorted(sizes.items())):
        job.progress(done, len(sizes))
        fmt = job.formats[name] = config.format_of(name)
        tensors = {key: job.reader.get(f"{name}.{key}") for key in fmt.tensor_shapes(k, n)}
        for key, tensor in TARGETS[to](name, fmt, tensors, job.dtype).items():
            yield name_on_disk(f"{name}.{key}", model_type), tensor
    job.progress(len(sizes), len(sizes))
    for name in job.reader.names():
        module, _, key = name.rpartition(".")
        if module not in sizes or key == "bias":
            tensor = job.reader.get(name)
            if to == "dense" and tensor.is_floating_point():
                tensor = in_range(name, tensor, job.dtype)
            yield name_on_disk(name, model_type), tensor


def _exported_config(job: _Job, config: CheckpointConfig, to: str) -> dict[str, Any]:
    values = {key: value for key, value in job.values.items() if key != "quantization_config"}
    if to == "dense":
        return values | {"dtype": str(job.dtype).removeprefix("torch.")}
    return values | {"quantization_config": compressed_config(config, job.formats)}


def _imported(job: _Job, method: str) -> Iterator[tuple[str, Tensor]]:
    names = linear_names(job.reader, method)
    if not names:
        raise ValueError(f"{job.source}: got no quantised linear, need tensors named *.{TENSORS[method][0]}")
    taken = {f"{name}.{key}" for name in names for key in (TENSORS[method][0], *TENSORS[method][1])}
    for done, name in enumerate(names):
        job.progress(done, len(names))
        bits, codes = read_linear(job.reader, method, name, job.values["quantization_config"])
        converted = to_rosaq(name, bits, codes)
        job.formats[name] = converted.format
        for key, tensor in converted.tensors.items():
            yield f"{name}.{key}", tensor
        if f"{name}.bias" in job.reader:
            bias, need = job.reader.get(f"{name}.bias"), "smaller ones: rosaq stores a bias in float16"
            yield f"{name}.bias", in_range(f"{name}.bias", bias, torch.float16, need)
            taken.add(f"{name}.bias")
    job.progress(len(names), len(names))
    for name in job.reader.names():
        if name not in taken:
            yield name, job.reader.get(name)


def _imported_config(job: _Job) -> dict[str, Any]:
    """config.json with rosaq's quantization_config: overrides by full name, and every other linear left alone."""
    # transformers is only needed here, and slow to import.
    from rosaq.integrations.transformers_model import ModelShape, dense_model

    default = Counter(job.formats.values()).most_common(1)[0][0]
    overrides = {name: fmt for name, fmt in job.formats.items() if fmt != default}
    values = {key: value for key, value in job.values.items() if key != "quantization_config"}
    config = CheckpointConfig(default, overrides, (), f"from {job.values['quantization_config']['quant_method']}")
    model = dense_model(values)
    every = ModelShape.of(model, config)
    skipped = tuple(sorted(set(every.linears) - set(job.formats)))
    config = replace(config, modules_to_not_convert=skipped)
    shape = ModelShape.of(model, config)
    return values | {"quantization_config": replace(config, tp_sizes=shape.rank_counts(config)).to_dict()}
