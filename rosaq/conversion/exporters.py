"""rosaq checkpoints as others read them: dense weights, and compressed-tensors' pack-quantized."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from rosaq.config import LinearFormat
from rosaq.conversion.codes import pack_rows
from rosaq.linear import RosaqLinear

Tensors = dict[str, Tensor]


def dense(name: str, fmt: LinearFormat, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """{"weight": [n, k]} of `dtype`, salient directions and rotation included; ValueError where it overflows."""
    weight = RosaqLinear.from_tensors(dict(tensors), fmt, name=name).dequantize()
    return {"weight": in_range(f"{name}.weight", weight, dtype)}


def in_range(name: str, tensor: Tensor, dtype: torch.dtype, need: str = "dtype bfloat16 (--dtype bfloat16)") -> Tensor:
    """`tensor` as `dtype`; ValueError where a number becomes Inf, which tells what is needed."""
    result = tensor.to(dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(result).all()):
        raise ValueError(
            f"{name}: got values up to {float(tensor.abs().max()):.3g}, which {dtype} cannot hold, need {need}"
        )
    return result


def compressed(name: str, fmt: LinearFormat, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """weight_packed, weight_scale, weight_shape, weight_zero_point: the same codes, so nothing is rounded again.

    ValueError for what the format has no place for: salient directions, online rotations, zero points between codes.
    """
    del dtype
    if fmt.num_salient or fmt.rotation_size:
        raise ValueError(
            f"{name}: got {fmt.num_salient} salient directions and an online rotation of size {fmt.rotation_size}, "
            "need none of both for compressed-tensors; convert to 'dense', or quantise with --recipe gptq"
        )
    if "zeros" in tensors and (strays := int((tensors["zeros"] >= 2**fmt.bits).sum())):
        raise ValueError(
            f"{name}: got {strays} zero points that are no codes, need whole ones for compressed-tensors; convert to "
            "'dense', or quantise with --recipe gptq"
        )
    n, k = tensors["qweight"].shape[0], tensors["qweight"].shape[1] * 32 // fmt.bits
    result = {
        "weight_packed": tensors["qweight"],
        "weight_scale": tensors["scales"],
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    if "zeros" in tensors:
        result["weight_zero_point"] = pack_rows(tensors["zeros"].T.contiguous(), fmt.bits).T.contiguous()
    return result


def compressed_config(formats: dict[str, LinearFormat], ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors for linears of `formats` {module path: format}.

    ignore: full paths of the linears that are not quantised. Unlike modules_to_not_convert of transformers, it does not
    match by prefix or suffix.
    """
    names_of: dict[LinearFormat, list[str]] = {}
    for name, fmt in formats.items():
        names_of.setdefault(fmt, []).append(name)
    groups = {}
    for number, (fmt, names) in enumerate(names_of.items()):
        targets = ["Linear"] if len(names_of) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": fmt.bits,
                "type": "int",
                "symmetric": fmt.symmetric,
                "strategy": "channel" if fmt.group_size == -1 else "group",
                "group_size": None if fmt.group_size == -1 else fmt.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
