"""Bits per weight of anybody's checkpoint, by one rule: the stored bytes of its linears' tensors over their weights.

Codes, scales, zero points, salient directions, rotations: whatever is stored for a linear counts, at the width that
the file gives it. Left out is what says nothing about the weights: the bias, a `weight_shape`, and an input order
(`g_idx`, `weight_g_idx`) that is merely 0, 0, ... 1, 1, ... in groups. Embeddings and norms are no linears.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor

from rosaq.checkpoint import WeightReader

NOT_COUNTED = ("bias", "weight_shape")
ORDERS = ("g_idx", "weight_g_idx")


def linear_numels(dense: Path) -> dict[str, int]:
    """{module path: n * k} of the linears of the dense model's blocks."""
    reader = WeightReader(dense)
    shapes = {name.removesuffix(".weight"): reader.shape(name) for name in reader.names() if ".layers." in name}
    return {module: shape[0] * shape[1] for module, shape in shapes.items() if len(shape) == 2}


def bits_per_weight(checkpoint: Path, dense: Path) -> float:
    """Of a safetensors directory, or of a GGUF file, made from the model in `dense`.

    ValueError for a linear of `dense` that `checkpoint` holds nothing of: bits would be missing.
    """
    numels = linear_numels(dense)
    stored = _gguf_bytes(checkpoint, numels) if checkpoint.suffix == ".gguf" else _directory_bytes(checkpoint, numels)
    missing = sorted(set(numels) - set(stored))
    if missing:
        raise ValueError(
            f"{checkpoint}: got no tensor of {missing[0]} ({len(missing)} such), need all linears of {dense}"
        )
    return 8 * sum(stored.values()) / sum(numels.values())


def _directory_bytes(checkpoint: Path, numels: dict[str, int]) -> dict[str, int]:
    reader, stored = WeightReader(checkpoint), dict[str, int]()
    for name in reader.names():
        module, _, key = name.rpartition(".")
        if module not in numels or key in NOT_COUNTED or (key in ORDERS and _is_trivial(reader.get(name))):
            continue
        stored[module] = stored.get(module, 0) + reader.nbytes(name)
    return stored


def _is_trivial(order: Tensor) -> bool:
    """Neighbouring channels in equal groups, so that nothing has to be stored to know it."""
    group = len(order) // (int(order.max()) + 1)
    return torch.equal(order, torch.arange(len(order), dtype=order.dtype) // group)


def _gguf_bytes(file: Path, numels: dict[str, int]) -> dict[str, int]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1000)
    modules = {names.get_name(f"{module}.weight", try_suffixes=(".weight",)): module for module in numels}
    tensors = gguf.GGUFReader(file).tensors
    return {modules[tensor.name]: int(tensor.n_bytes) for tensor in tensors if tensor.name in modules}
