"""What a checkpoint says it holds, whether it holds that, and how many bits it takes. No tensor is read for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from rosaq.checkpoint.reader import WeightReader, read_json
from rosaq.config import SUPPORTED_BITS, CheckpointConfig, LinearFormat


def read_config(directory: str | Path) -> CheckpointConfig:
    """`quantization_config` of the checkpoint in `directory`; ValueError if it is not a rosaq checkpoint."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, need a model directory with config.json")
    values = read_json(path).get("quantization_config")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got no quantization_config, need a checkpoint written by rosaq")
    return CheckpointConfig.from_dict(values)


def linear_sizes(config: CheckpointConfig, reader: WeightReader) -> dict[str, tuple[int, int]]:
    """{module path: (n, k)} of every quantised linear, by name.

    ValueError, naming the tensor, where one is missing, does not belong, or has another shape or dtype than the
    config says: such a checkpoint would load as something else than was meant.
    """
    tensors: dict[str, list[str]] = {}
    for name in reader.names():
        module, _, key = name.rpartition(".")
        tensors.setdefault(module, []).append(key)
    sizes = {}
    for module, keys in tensors.items():
        if "qweight" not in keys:
            continue
        fmt = config.format_of(module)
        n, num_words = _matrix_shape(reader, f"{module}.qweight")
        k = num_words * 32 // fmt.bits
        if fmt.group_size != -1 and f"{module}.scales" in reader:
            _check_bits_held(module, fmt, num_words, _matrix_shape(reader, f"{module}.scales")[1])
        fmt.check_sizes(k, n, module)
        shapes = fmt.tensor_shapes(k, n, bias="bias" in keys)
        for key in sorted({*keys, *shapes}):
            got = (reader.shape(f"{module}.{key}"), reader.dtype(f"{module}.{key}")) if key in keys else None
            need = (shapes[key][0], getattr(torch, shapes[key][1])) if key in shapes else None
            if got != need:
                raise ValueError(f"{module}.{key}: got {_told(got)}, need {_told(need)}")
        sizes[module] = (n, k)
    return sizes


def _matrix_shape(reader: WeightReader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2:
        raise ValueError(f"{name}: got shape {list(shape)}, need two dimensions")
    return shape[0], shape[1]


def _check_bits_held(module: str, fmt: LinearFormat, num_words: int, groups: int) -> None:
    """Say it plainly where the codes are of another width than config.json claims."""
    for bits in SUPPORTED_BITS:
        if bits != fmt.bits and groups * fmt.group_size * bits == 32 * num_words:
            raise ValueError(
                f"{module}.qweight: got codes of {bits} bits, need {fmt.bits} by config.json; "
                "config.json and the weights are not of one checkpoint: fetch both again"
            )


def _told(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "no such tensor" if tensor is None else f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}"


def is_in_block(module: str) -> bool:
    """True for a linear of one of the model's blocks, which have a number in their path: not for the output head."""
    return any(part.isdecimal() for part in module.split("."))


def linear_bytes(reader: WeightReader, config: CheckpointConfig, module: str, size: tuple[int, int]) -> int:
    """Bytes of every tensor but the bias of the quantised linear `module` of size (n, k)."""
    return sum(_bytes_by_tensor(reader, config, module, size).values())


def _bytes_by_tensor(
    reader: WeightReader, config: CheckpointConfig, module: str, size: tuple[int, int]
) -> dict[str, int]:
    n, k = size
    return {name: reader.nbytes(f"{module}.{name}") for name in config.format_of(module).tensor_shapes(k, n)}


def bits_by_tensor(directory: str | Path) -> dict[str, float]:
    """{"qweight": bits stored per weight of the blocks' quantised linears, ...} of every tensor but the bias: what
    `bits_per_weight` is the sum of."""
    config, reader = read_config(directory), WeightReader(directory)
    sizes = linear_sizes(config, reader)
    sizes = {module: size for module, size in sizes.items() if is_in_block(module)} or sizes
    if not sizes:
        raise ValueError(f"{directory}: got no quantised linear, need tensors named *.qweight")
    stored: Counter[str] = Counter()
    for module, size in sizes.items():
        stored.update(_bytes_by_tensor(reader, config, module, size))
    num_weights = sum(n * k for n, k in sizes.values())
    return {name: 8 * num_bytes / num_weights for name, num_bytes in stored.items()}


def bits_per_weight(directory: str | Path) -> float:
    """Bits stored per weight of the blocks' quantised linears: every tensor of theirs but the bias, over the sum of
    n * k. An output head is left out, so that checkpoints with and without codes for it can be compared."""
    return sum(bits_by_tensor(directory).values())


def total_bytes(directory: str | Path) -> int:
    """Bytes of every tensor of the checkpoint, quantised or not (embeddings and norms included)."""
    reader = WeightReader(directory)
    return sum(reader.nbytes(name) for name in reader.names())
