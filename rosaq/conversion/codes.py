"""What every low-bit format holds: integer codes, steps and zero points; and how the others pack them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rosaq import ops
from rosaq.config import LinearFormat

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds the column AWQ_ORDER[i] of its eight


class Codes(NamedTuple):
    """One linear: codes uint8 [n, k], scales [n, groups] of any float, zeros uint8 [n, groups]; W = (c - z) * s."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True)
class Converted:
    """One linear in rosaq's layout."""

    format: LinearFormat
    tensors: dict[str, Tensor]


def to_rosaq(name: str, bits: int, codes: Codes) -> Converted:
    """ValueError, with `name`, where rosaq has no such format or float16 cannot hold a step to 11 bits."""
    n, k = codes.codes.shape
    groups = codes.scales.shape[1]
    is_symmetric = bool((codes.zeros == 2 ** (bits - 1)).all())
    fmt = LinearFormat(bits, -1 if groups == 1 else k // groups, symmetric=is_symmetric)
    fmt.check_sizes(k, n, name)
    scales = codes.scales.to(torch.float16)
    off = ((scales.double() - codes.scales.double()).abs() > codes.scales.double().abs() * 2.0**-11).sum()
    if off:
        raise ValueError(
            f"{name}.scales: got {int(off)} values down to {float(codes.scales.abs().min()):.2g} that float16 cannot "
            "hold, need steps of 6e-5 or more"
        )
    tensors = {"qweight": ops.pack(codes.codes.contiguous(), bits), "scales": scales.contiguous()}
    if not is_symmetric:
        tensors["zeros"] = codes.zeros.contiguous()
    return Converted(fmt, tensors)


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """words int32 [rows, w], each row a little-endian bit string -> its first `count` codes, uint8 [rows, count]."""
    # Whole blocks of 32 codes: `bits` words each.
    pad = -words.shape[1] % bits
    return ops.unpack(torch.nn.functional.pad(words, (0, pad)).contiguous(), bits)[:, :count]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unpack_rows`: codes uint8 [rows, count] -> int32 [rows, ceil(count * bits / 32)]."""
    count = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, -count % 32)).contiguous()
    return ops.pack(padded, bits)[:, : -(-count * bits // 32)].contiguous()
