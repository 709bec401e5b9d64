"""GPTQ, AWQ and compressed-tensors checkpoints, one linear at a time, as codes, steps and zero points.

Sizes are read from the tensors, not from config.json, which names one width for checkpoints that mix them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosaq.checkpoint import WeightReader
from rosaq.conversion.codes import AWQ_ORDER, Codes, unpack_rows
from rosaq.experts import ON_DISK

# {quant_method: (the tensor every linear has, the other tensors it may have)}
TENSORS = {
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
    "compressed-tensors": (
        "weight_packed",
        ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    ),
}
Linear = Callable[[str], Tensor | None]  # a linear's tensor by its last name, None where it has no such


def read_gptq(name: str, get: Linear, config: dict[str, Any]) -> tuple[int, Codes]:
    """qweight int32 [k * bits / 32, n], qzeros int32 [k / g, n * bits / 32], scales [k / g, n], g_idx int32 [k]."""
    qweight, scales, qzeros = _need(name, get, "qweight"), _need(name, get, "scales"), _need(name, get, "qzeros")
    groups, n = scales.shape
    bits = qzeros.shape[1] * 32 // n
    _check_bits(name, bits)
    k = qweight.shape[0] * 32 // bits
    _check_order(name, get("g_idx"), k, groups)
    codes = unpack_rows(qweight.T.contiguous(), bits, k)
    zeros = unpack_rows(qzeros, bits, n)
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)  # the first version of the format stores zero - 1, in `bits` bits
    return bits, Codes(codes, scales.T, zeros.T)


def read_awq(name: str, get: Linear, config: dict[str, Any]) -> tuple[int, Codes]:
    """qweight int32 [k, n / 8], qzeros int32 [k / g, n / 8], both interleaved; scales [k / g, n]. 4 bits only."""
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"quantization_config.version: got {config['version']!r}, need 'gemm'")
    qweight, scales, qzeros = _need(name, get, "qweight"), _need(name, get, "scales"), _need(name, get, "qzeros")
    n = scales.shape[1]
    _check_bits(name, qweight.shape[1] * 32 // n)
    codes, zeros = (_undo_interleave(unpack_rows(t, 4, n)) for t in (qweight, qzeros))
    return 4, Codes(codes.T, scales.T, zeros.T)


def _undo_interleave(codes: Tensor) -> Tensor:
    back = torch.argsort(torch.tensor(AWQ_ORDER))
    ordered: Tensor = codes.unflatten(1, (-1, len(AWQ_ORDER)))[..., back]
    return ordered.flatten(1)


def read_compressed(name: str, get: Linear, config: dict[str, Any]) -> tuple[int, Codes]:
    """weight_packed int32 [n, k * bits / 32] of codes + 2**(bits-1), weight_scale [n, groups], weight_shape [2],
    weight_zero_point int32 [n * bits / 32, groups] (asymmetric)."""
    _check_compressed(config)
    packed, scales = _need(name, get, "weight_packed"), _need(name, get, "weight_scale")
    n, k = (int(size) for size in _need(name, get, "weight_shape"))
    _check_order(name, get("weight_g_idx"), k, scales.shape[1])
    words = packed.shape[1]
    # Before version 0.18 three bits were ten to a word.
    is_ten_to_a_word = words == -(-k // 10) and words * 32 // k == 3 and words * 32 != 3 * k
    bits = 3 if is_ten_to_a_word else words * 32 // k
    _check_bits(name, bits)
    unpack = _unpack_tens if is_ten_to_a_word else lambda t, count: unpack_rows(t, bits, count)
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    packed_zeros = get("weight_zero_point")
    if packed_zeros is not None:
        zeros = unpack(packed_zeros.T.contiguous(), n).T
    return bits, Codes(unpack(packed, k), scales, zeros)


def _unpack_tens(words: Tensor, count: int) -> Tensor:
    """Three-bit codes, ten in the low 30 bits of each word."""
    codes = words.unsqueeze(-1) >> torch.arange(0, 30, 3, dtype=torch.int32) & 7
    return codes.flatten(1)[:, :count].to(torch.uint8)


def _check_compressed(config: dict[str, Any]) -> None:
    if config.get("format") != "pack-quantized":
        raise ValueError(f"quantization_config.format: got {config.get('format')!r}, need 'pack-quantized'")
    if config.get("transform_config"):
        raise ValueError("quantization_config.transform_config: got online transforms, need none")
    for group in config.get("config_groups", {}).values():
        if isinstance(group, dict) and group.get("input_activations"):
            raise ValueError("quantization_config.config_groups: got quantised activations, need weights only")


def _need(name: str, get: Linear, key: str) -> Tensor:
    tensor = get(key)
    if tensor is None:
        raise ValueError(f"{name}.{key}: got no such tensor, need it")
    return tensor


def _check_bits(name: str, bits: int) -> None:
    if bits not in (3, 4):
        raise ValueError(f"{name}: got codes of {bits} bits, need 3 or 4")


def _check_order(name: str, g_idx: Tensor | None, k: int, groups: int) -> None:
    """rosaq's groups are neighbouring channels; a permutation (`desc_act`) has no place in its layout."""
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(k) // (k // groups)):
        raise ValueError(
            f"{name}: got channels grouped in another order (desc_act / actorder 'group'), need neighbours; "
            "quantise again with desc_act=False, or the dense model with `rosaq quantize`"
        )


READERS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed}


def linear_names(reader: WeightReader, method: str) -> list[str]:
    """The quantised linears of a checkpoint of quantisation method `method`, by name."""
    suffix = "." + TENSORS[method][0]
    return sorted(name.removesuffix(suffix) for name in reader.names() if name.endswith(suffix))


def name_in_memory(name: str, model_type: str) -> str:
    """What the model calls the tensor or module that checkpoints on the hub call `name`; rosaq writes these names."""
    in_memory, on_disk = ON_DISK.get(model_type, ("", ""))
    return name.replace(on_disk, in_memory) if on_disk else name


def read_linear(reader: WeightReader, method: str, name: str, config: dict[str, Any]) -> tuple[int, Codes]:
    """(bits, codes) of one linear; ValueError naming the tensor where it cannot be read or has no place in rosaq."""

    def get(key: str) -> Tensor | None:
        full = f"{name}.{key}"
        return reader.get(full) if full in reader else None

    bits, codes = READERS[method](name, get, config)
    return bits, codes
