"""`rosaq convert SOURCE -o OUT`: stream a checkpoint into another format, one linear and one shard in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from rosaq.checkpoint import (
    WeightReader,
    copy_companions,
    linear_sizes,
    model_directory,
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
from rosaq.conversion.importers import READERS, TENSORS, linear_names, name_in_memory, read_linear
from rosaq.experts import name_on_disk, replace_fused

TARGETS = {"dense": dense, "compressed-tensors": compressed}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Progress = Callable[[int, int], None]
# Where AutoGPTQ and AutoAWQ wrote their settings before they wrote them into config.json.
_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


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

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type"))

    @property
    def dense_values(self) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if key != "quantization_config"}

    def model(self) -> nn.Module:
        """What config.json describes, without weights; ValueError for an architecture that transformers has not."""
        # transformers is only needed here, and slow to import.
        from rosaq.integrations.transformers_model import dense_model

        try:
            model = dense_model(self.values)
        except (ValueError, KeyError) as error:
            told = shorten(str(error), 160, placeholder=" ...")  # transformers lists every name it has
            raise ValueError(f"{self.source}/config.json: got {told}, need a model that transformers has") from error
        replace_fused(model)
        return model


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint in `source`, a directory or a hub name, to the new directory `output` in another format.

    From a rosaq checkpoint: to="dense" (default; weights of `dtype`, float16 where None, works anywhere) or
    "compressed-tensors" (the same codes; only without salient directions and online rotations; 3 bits need
    compressed-tensors 0.18 or newer).
    From GPTQ, AWQ (gemm) or compressed-tensors (pack-quantized) of 3 or 4 bits: to="rosaq", the same codes.

    ValueError for another format, target or dtype, for a dtype where the target is not "dense", and for tensors that
    the target has no place for, by name; FileNotFoundError where `source` is no model directory.
    """
    source, output = model_directory(source, "source"), Path(output)
    values = _read_values(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, need one of {sorted(DTYPES)}")
    method = str((values.get("quantization_config") or {}).get("quant_method", "dense"))
    possible = list(TARGETS) if method == QUANT_METHOD else [QUANT_METHOD] if method in READERS else []
    if not possible:
        hint = ", or `rosaq quantize`, which takes dense ones" if method == "dense" else ""
        raise ValueError(f"{source}: got a {method} checkpoint, need rosaq or one of {sorted(READERS)}{hint}")
    to = possible[0] if to is None else to
    if to not in possible:
        raise ValueError(f"to: got {to!r} for a {method} checkpoint, need one of {possible}")
    if dtype is not None and to != "dense":
        raise ValueError(f"dtype: got {dtype!r} for the target {to!r}, need none: only 'dense' has weights of a dtype")
    torch_dtype = DTYPES[dtype or "float16"]
    job = _Job(source, WeightReader(source), values, torch_dtype, progress or (lambda _done, _total: None))
    with new_directory(output, force=force, source=source) as directory:
        if to == QUANT_METHOD:
            _import(job, directory, method)
        else:
            _export(job, directory, to)
    return Conversion(method, to, len(job.formats), total_bytes(source), total_bytes(output))


def _read_values(source: Path) -> dict[str, Any]:
    """config.json, with the settings of the quantisation where older checkpoints have them in a file of their own."""
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"source: got {source} without config.json, need a model directory")
    values = read_json(source / "config.json")
    for name, method in _SETTINGS.items():
        if not values.get("quantization_config") and (source / name).is_file():
            values["quantization_config"] = {"quant_method": method} | read_json(source / name)
    return values


def _write(
    job: _Job, directory: Path, tensors: Iterator[tuple[str, Tensor]], config: Callable[[], dict[str, Any]]
) -> None:
    write_shards(directory, tensors)
    copy_companions(job.source, directory, without=_SETTINGS)
    (directory / "config.json").write_text(json.dumps(config(), indent=2) + "\n", encoding="utf-8")
    write_hashes(directory)


# --- from rosaq -----------------------------------------------------------------------------------------------------


def _export(job: _Job, directory: Path, to: str) -> None:
    config = read_config(job.source)
    if to == "dense":
        values = job.dense_values | {"dtype": str(job.dtype).removeprefix("torch.")}
        _write(job, directory, _exported(job, config, to), lambda: values)
    else:
        matrices = _matrices(job.model())  # before any work: this architecture may be unknown
        _write(job, directory, _exported(job, config, to), lambda: _compressed_values(job, matrices))


def _exported(job: _Job, config: CheckpointConfig, to: str) -> Iterator[tuple[str, Tensor]]:
    sizes = linear_sizes(config, job.reader)
    for done, (name, (n, k)) in enumerate(sorted(sizes.items())):
        job.progress(done, len(sizes))
        fmt = job.formats[name] = config.format_of(name)
        tensors = {key: job.reader.get(f"{name}.{key}") for key in fmt.tensor_shapes(k, n)}
        for key, tensor in TARGETS[to](name, fmt, tensors, job.dtype).items():
            yield name_on_disk(f"{name}.{key}", job.model_type), tensor
    job.progress(len(sizes), len(sizes))
    for name in job.reader.names():
        module, _, key = name.rpartition(".")
        if module not in sizes or key == "bias":
            tensor = job.reader.get(name)
            if to == "dense" and tensor.is_floating_point():
                tensor = in_range(name, tensor, job.dtype)
            yield name_on_disk(name, job.model_type), tensor


def _compressed_values(job: _Job, matrices: list[str]) -> dict[str, Any]:
    formats = {name_on_disk(name, job.model_type): fmt for name, fmt in job.formats.items()}
    ignore = [name for name in (name_on_disk(name, job.model_type) for name in matrices) if name not in formats]
    return job.dense_values | {"quantization_config": compressed_config(formats, ignore)}


def _matrices(model: nn.Module) -> list[str]:
    """The linears of `model`, and the routers of a mixture, which are linears for other engines."""
    weights = {name: getattr(m, "weight", None) for name, m in model.named_modules() if type(m) is not nn.Embedding}
    return [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() == 2]


# --- to rosaq -------------------------------------------------------------------------------------------------------


def _import(job: _Job, directory: Path, method: str) -> None:
    from rosaq.integrations.transformers_model import ModelShape

    names = {name: name_in_memory(name, job.model_type) for name in linear_names(job.reader, method)}
    if not names:
        raise ValueError(f"{job.source}: got no quantised linear, need tensors named *.{TENSORS[method][0]}")
    model = job.model()
    whole = ModelShape.of(model, CheckpointConfig(LinearFormat(), modules_to_not_convert=()))
    strays = [name for name, own in names.items() if own not in whole.linears]
    if strays:  # transformers would drop their codes, and run on random numbers
        raise ValueError(
            f"{strays[0]}: got codes of {len(strays)} linears that {whole.name} has not, need a model all of whose "
            "quantised linears are linears in transformers, by the same names"
        )
    _write(job, directory, _imported(job, method, names, whole.known), lambda: _imported_config(job, model))


def _imported(job: _Job, method: str, names: dict[str, str], known: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the linears `names` {in the files: in the model}, then all others; `known`: those of the model."""
    taken = {f"{name}.{key}" for name in names for key in (TENSORS[method][0], *TENSORS[method][1])}
    for done, (name, own) in enumerate(names.items()):
        job.progress(done, len(names))
        bits, codes = read_linear(job.reader, method, name, job.values["quantization_config"])
        converted = to_rosaq(name, bits, codes)
        job.formats[own] = converted.format
        for key, tensor in converted.tensors.items():
            yield f"{own}.{key}", tensor
        bias = f"{name}.bias"
        if bias in job.reader:
            taken.add(bias)
            tensor = job.reader.get(bias)
            if f"{own}.bias" in known:
                need = "smaller ones: rosaq stores a bias in float16"
                yield f"{own}.bias", in_range(bias, tensor, torch.float16, need)
            elif bool(tensor.any()):  # older AutoGPTQ gives every linear a bias, of zeros where the model has none
                raise ValueError(f"{bias}: got numbers other than 0, need no such tensor: the model has no bias there")
    job.progress(len(names), len(names))
    for name in job.reader.names():
        if name not in taken:
            yield name_in_memory(name, job.model_type), job.reader.get(name)


def _imported_config(job: _Job, model: nn.Module) -> dict[str, Any]:
    """config.json with rosaq's quantization_config: overrides by full name, and every other linear left alone."""
    from rosaq.integrations.transformers_model import ModelShape

    default = Counter(job.formats.values()).most_common(1)[0][0]
    overrides = {name: fmt for name, fmt in job.formats.items() if fmt != default}
    config = CheckpointConfig(default, overrides, (), f"from {job.values['quantization_config']['quant_method']}")
    skipped = tuple(sorted(set(ModelShape.of(model, config).linears) - set(job.formats)))
    config = replace(config, modules_to_not_convert=skipped)
    config = replace(config, tp_sizes=ModelShape.of(model, config).rank_counts(config))
    return job.dense_values | {"quantization_config": config.to_dict()}
