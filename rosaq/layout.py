"""The disk layout in slow, clear torch: any device, no compiled code. `rosaq.ops.pack` and `unpack` do the same, fast.

A row of `qweight` is one little-endian bit string: code j sits at bits [j * bits, (j + 1) * bits), bit i being bit
i % 32 of word i // 32. 32 codes fill exactly `bits` words, so k must be a multiple of 32. For 3 bits the row begins

    word 0   bit 31                                          bit 0
             [c10: 2 low bits] [c9] [c8] ... [c2] [c1] [c0]
    word 1   [c21: 1 low bit] [c20] ... [c11] [c10: high bit]
    word 2   [c31] [c30] ... [c22] [c21: 2 high bits]

W = (codes - zero) * scale, one scale and zero per row and group of k / g channels; without zeros the zero is
2**(bits-1). A byte of `zeros` is a whole number in bits 0-6, and its bit 7 is one half: 3 is 3, 131 is 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rosaq.config import LinearFormat, check_bits

BLOCK = 32  # codes that fill whole words
_ROWS_AT_ONCE = 1024  # every bit takes 8 bytes on the way: all at once for a head of 100,000 rows would be gigabytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes integer [n, k], each in 0 to 2**bits - 1 -> qweight int32 [n, k * bits / 32].

    ValueError if k is not a multiple of 32 or a code does not fit.
    """
    check_bits(bits)
    if codes.dim() != 2 or codes.size(1) % BLOCK:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}, need [n, k] with k a multiple of {BLOCK}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes: got {int(codes.min())} to {int(codes.max())}, need 0 to {2**bits - 1}")
    return torch.cat([_pack(rows, bits) for rows in codes.split(_ROWS_AT_ONCE)])


def _pack(codes: Tensor, bits: int) -> Tensor:
    code_bits = codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
    words = code_bits.reshape(codes.size(0), codes.size(1) * bits // 32, 32) << torch.arange(32, device=codes.device)
    unsigned = words.sum(-1)  # 0 to 2**32 - 1; int32 has the same bits
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack(qweight: Tensor, bits: int) -> Tensor:
    """qweight int32 [n, k * bits / 32] -> codes uint8 [n, k]; inverse of `pack`. ValueError for another shape."""
    check_bits(bits)
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.size(1) % bits:
        raise ValueError(f"qweight: got {qweight.dtype} {tuple(qweight.shape)}, need int32 [n, k * {bits} / 32]")
    return torch.cat([_unpack(rows, bits) for rows in qweight.split(_ROWS_AT_ONCE)])


def _unpack(qweight: Tensor, bits: int) -> Tensor:
    word_bits = qweight.to(torch.int64).unsqueeze(-1) >> torch.arange(32, device=qweight.device) & 1
    k = qweight.size(1) // bits * BLOCK
    code_bits = word_bits.reshape(qweight.size(0), k, bits) << torch.arange(bits, device=qweight.device)
    return code_bits.sum(-1).to(torch.uint8)


_HALF = 128  # bit 7 of a byte of `zeros`


def zero_points(zeros: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The zero points that bytes of `zeros` stand for: uint8 of any shape -> `dtype`, multiples of 1/2, exact."""
    return (zeros % _HALF).to(dtype) + (zeros >= _HALF).to(dtype) / 2


def zero_bytes(zero: Tensor) -> Tensor:
    """Zero points (float, multiples of 1/2 in [0, 127.5]) of any shape -> uint8; inverse of `zero_points`."""
    whole = zero.floor()
    return (whole + _HALF * (zero - whole).ceil()).to(torch.uint8)


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W [n, k] = (codes - zero) * scale in `dtype` (exact in float32).

    qweight int32 [n, k * bits / 32], scales [n, g], zeros uint8 [n, g] or None for symmetric. ValueError if g does not
    divide k or the shapes of scales and zeros differ.
    """
    codes = unpack(qweight, bits)
    n, k = codes.shape
    if scales.dim() != 2 or scales.size(0) != n or scales.size(1) == 0 or k % scales.size(1):
        raise ValueError(f"scales: got shape {tuple(scales.shape)}, need [{n}, g] with g dividing {k}")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros: got shape {tuple(zeros.shape)}, need {tuple(scales.shape)} as scales")
    group_size = k // scales.size(1)
    zero = torch.full_like(scales, 2 ** (bits - 1), dtype=dtype) if zeros is None else zero_points(zeros, dtype)
    per_column = [t.repeat_interleave(group_size, dim=1) for t in (zero, scales.to(dtype))]
    return (codes.to(dtype) - per_column[0]) * per_column[1]


def dense_weight(tensors: Mapping[str, Tensor], fmt: LinearFormat, *, rotated: bool = False) -> Tensor:
    """The float32 weight [n, k] that a linear's disk tensors stand for, salient directions and rotation included.

    It acts on x, or with `rotated` on t = x · blockdiag(rotation).
    """
    weight = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), fmt.bits)
    if fmt.num_salient and fmt.salient == "index":
        weight.index_add_(1, tensors["salient_index"].long(), tensors["salient_weight"].float())
    elif fmt.num_salient:
        weight += tensors["salient_weight"].float() @ tensors["salient_basis"].float().T
    if fmt.rotation_size and not rotated:
        blocks = weight.unflatten(1, (-1, fmt.rotation_size))
        rotation = tensors["rotation"].float()
        back = blocks @ rotation[0].T if len(rotation) == 1 else torch.einsum("nbj,bij->nbi", blocks, rotation)
        weight = back.flatten(1)
    return weight
