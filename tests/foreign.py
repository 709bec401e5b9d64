"""Checkpoints in other people's formats, packed with Python integers: no line of rosaq is involved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import tiny_llama

Tensors = dict[str, Tensor]


def bit_strings(codes: Tensor, bits: int) -> Tensor:
    """codes [rows, count] -> int32 [rows, ceil(count * bits / 32)], each row one little-endian bit string."""
    num_words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        string = sum(code << (bits * place) for place, code in enumerate(row))
        words = [string >> (32 * word) & 0xFFFFFFFF for word in range(num_words)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, version: int = 1) -> Tensors:
    """AutoGPTQ's tensors; version 1 stores zero - 1, wrapped to `bits` bits."""
    stored = (zeros.int() - 1) % 2**bits if version == 1 else zeros
    n, k = codes.shape
    return {
        "qweight": bit_strings(codes, bits).T.contiguous(),
        "qzeros": bit_strings(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(k) // (k // scales.shape[1])).int(),
    }


def awq(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensors:
    """AutoAWQ's gemm tensors: in every eight columns, nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def interleave(t: Tensor) -> Tensor:
        return bit_strings(t.unflatten(1, (-1, 8))[..., order].flatten(1), bits)

    return {"qweight": interleave(codes.T), "qzeros": interleave(zeros.T), "scales": scales.T.contiguous()}


def compressed(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, tens: bool = False) -> Tensors:
    """compressed-tensors' pack-quantized tensors; `tens`: three bits as before its version 0.18, ten to a word."""

    def pack(t: Tensor) -> Tensor:
        if not tens:
            return bit_strings(t, bits)
        padded = torch.nn.functional.pad(t, (0, -t.shape[1] % 10)).unflatten(1, (-1, 10))
        return torch.cat([bit_strings(padded[:, word], bits) for word in range(padded.shape[1])], 1)

    tensors = {
        "weight_packed": pack(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not (zeros == 2 ** (bits - 1)).all():
        tensors["weight_zero_point"] = pack(zeros.T).T.contiguous()
    return tensors


def save_foreign(
    directory: Path,
    pack: Callable[..., Tensors],
    config: dict[str, Any],
    *,
    bits: int,
    group_size: int = 32,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    **options: Any,
) -> torch.nn.Module:
    """Save a tiny Llama with random codes; returns the dense float32 model that the checkpoint means."""
    model, generator = tiny_llama(attention_bias=True), torch.Generator().manual_seed(7)
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        n, k = module.weight.shape
        groups, mid = k // group_size, 2 ** (bits - 1)
        codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
        zeros = torch.full_like(zeros, mid) if symmetric else zeros
        scales = ((0.5 + torch.rand(n, groups, generator=generator)) / mid / k**0.5).to(scale_dtype)
        per_column = [t.float().repeat_interleave(group_size, 1) for t in (zeros, scales)]
        module.weight.data = (codes.float() - per_column[0]) * per_column[1]
        del tensors[f"{name}.weight"]
        packed = pack(codes, scales, zeros, bits, **options)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
    for name, parameter in model.named_parameters():
        if not name.endswith("proj.weight"):
            parameter.data = parameter.data.half().float()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = model.config.to_dict() | {"dtype": "float16", "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(values, default=str))
    return model.float()
