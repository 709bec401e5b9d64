"""The ops of rosaq: thin documented wrappers over `torch.ops.rosaq.*`, and their fakes for tracing.

m tokens, n out_features, k in_features, r salient directions, g groups per row. Errors from the ops are RuntimeError
and name the op, the argument, what it got and what it needs. The ops are for inference: they have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.config import SUPPORTED_BITS

try:
    from rosaq import _C as _C
except ImportError as error:
    raise ImportError(
        "rosaq._C (the compiled kernels) cannot be loaded; build it with `pip install .` in the source tree, "
        f"or `pip install -e . --no-build-isolation` to develop. The loader said: {error}"
    ) from error

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def prepack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Disk layout -> the opaque blob that `fused_gemm` reads.

    qweight int32 [n, k*bits/32], scales float16 or bfloat16 [n, g], zeros uint8 [n, g] (None: symmetric, codes stored
    offset by 2**(bits-1)), bits 3 or 4. n a multiple of 8, k of 32, k / g of 32. Returns uint8, 1-D; `unprepack` is
    its exact inverse. RuntimeError for any other shape, dtype or device.
    """
    return torch.ops.rosaq.prepack.default(qweight, scales, zeros, bits)  # type: ignore[no-any-return]


def unprepack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The blob of `prepack` -> (qweight, scales, zeros), bit for bit as they went in.

    Cannot be traced: the shapes of what it returns are in the blob's bytes. RuntimeError unless `packed` is a whole blob.
    """
    return torch.ops.rosaq.unprepack.default(packed)  # type: ignore[no-any-return]


def fused_gemm(
    x: Tensor,
    packed: Tensor,
    salient_weight: Tensor | None = None,
    salient_index: Tensor | None = None,
    salient_basis: Tensor | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    """y = t W^T + s C^T + bias with t = x blockdiag(rotation), s = t[:, salient_index] or t salient_basis.

    x [..., k] float16, bfloat16 or float32 -> y [..., n] in x's dtype, accumulated in float32.
    packed           uint8, from `prepack`; W = (codes - zero) * scale.
    salient_weight   C [n, r] float16 or bfloat16, with exactly one of
    salient_index    int32 [r], 0 <= index < k, or
    salient_basis    [k, r] float16 or bfloat16.
    rotation         [B, b, b] float16 or bfloat16, B = k / b, or B = 1: one block for all k / b.
    bias             [n] float16, bfloat16 or float32.
    out_features, bits, group_size (-1: k), symmetric repeat what was packed; they are checked against the blob.
    A token with an infinite or NaN channel gives NaN. RuntimeError for anything that does not fit.
    """
    return torch.ops.rosaq.fused_gemm.default(  # type: ignore[no-any-return]
        x,
        packed,
        salient_weight,
        salient_index,
        salient_basis,
        rotation,
        bias,
        out_features,
        bits,
        group_size,
        symmetric,
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [n, k] below 2**bits -> qweight int32 [n, k*bits/32]: code j of a row at bits [j*bits, (j+1)*bits).

    RuntimeError if a code does not fit or k is not a multiple of 32. The PyTorch equivalent is `rosaq.layout.pack`.
    """
    return torch.ops.rosaq.pack.default(codes, bits)  # type: ignore[no-any-return]


def unpack(qweight: Tensor, bits: int) -> Tensor:
    """qweight int32 [n, k*bits/32] -> codes uint8 [n, k]; inverse of `pack`."""
    return torch.ops.rosaq.unpack.default(qweight, bits)  # type: ignore[no-any-return]


# --- fakes: the shape contracts again, for torch.compile and friends -----------------------------------------------


def _check_bits(op: str, bits: int) -> None:
    torch._check(bits in SUPPORTED_BITS, lambda: f"rosaq::{op}: bits: got {bits}, need one of {SUPPORTED_BITS}")


def _check_qweight(op: str, qweight: Tensor, bits: int) -> None:
    _check_bits(op, bits)
    torch._check(
        qweight.dtype == torch.int32 and qweight.dim() == 2 and qweight.size(1) % bits == 0,
        lambda: f"rosaq::{op}: qweight: got {qweight.dtype} {tuple(qweight.shape)}, need int32 [n, k * bits / 32]",
    )


@torch.library.register_fake("rosaq::prepack")
def _(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    _check_qweight("prepack", qweight, bits)
    n, k = qweight.size(0), qweight.size(1) // bits * 32
    torch._check(
        scales.dim() == 2 and scales.size(0) == n,
        lambda: f"rosaq::prepack: scales: got shape {tuple(scales.shape)}, need [{n}, k / group_size]",
    )
    if zeros is not None:
        torch._check(
            zeros.dtype == torch.uint8 and zeros.shape == scales.shape,
            lambda: f"rosaq::prepack: zeros: got {zeros.dtype} {tuple(zeros.shape)}, need uint8 as scales",
        )
    return qweight.new_empty(
        _C.packed_bytes(int(n), int(k), bits, int(k // scales.size(1)), zeros is None), dtype=torch.uint8
    )


@torch.library.register_fake("rosaq::unprepack")
def _(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    raise NotImplementedError(
        f"rosaq::unprepack: packed: got a fake tensor {tuple(packed.shape)}, need a real one: "
        "the output shapes are in its bytes, so the op cannot be traced"
    )


@torch.library.register_fake("rosaq::fused_gemm")
def _(
    x: Tensor,
    packed: Tensor,
    salient_weight: Tensor | None,
    salient_index: Tensor | None,
    salient_basis: Tensor | None,
    rotation: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,  # noqa: ARG001  (fakes must have the schema's names)
) -> Tensor:
    _check_bits("fused_gemm", bits)
    torch._check(
        group_size == -1 or (group_size >= 32 and group_size % 32 == 0),
        lambda: f"rosaq::fused_gemm: group_size: got {group_size}, need a positive multiple of 32, or -1",
    )
    torch._check(x.dtype in _FLOATS, lambda: f"rosaq::fused_gemm: x: got dtype {x.dtype}, need one of {_FLOATS}")
    torch._check(x.dim() >= 1, lambda: "rosaq::fused_gemm: x: got a scalar, need [..., k]")
    torch._check(
        packed.dtype == torch.uint8 and packed.dim() == 1,
        lambda: f"rosaq::fused_gemm: packed: got {packed.dtype} {tuple(packed.shape)}, need uint8, 1-D",
    )
    if salient_weight is not None:
        torch._check(
            (salient_index is None) != (salient_basis is None),
            lambda: "rosaq::fused_gemm: salient_weight: need exactly one of salient_index and salient_basis",
        )
        torch._check(
            salient_weight.dim() == 2 and salient_weight.size(0) == out_features,
            lambda: f"rosaq::fused_gemm: salient_weight: got {tuple(salient_weight.shape)}, need [{out_features}, r]",
        )
    if rotation is not None:
        torch._check(
            rotation.dim() == 3 and rotation.size(1) == rotation.size(2),
            lambda: f"rosaq::fused_gemm: rotation: got shape {tuple(rotation.shape)}, need [B, b, b]",
        )
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.size(0) == out_features,
            lambda: f"rosaq::fused_gemm: bias: got shape {tuple(bias.shape)}, need [{out_features}]",
        )
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("rosaq::pack")
def _(codes: Tensor, bits: int) -> Tensor:
    _check_bits("pack", bits)
    torch._check(
        codes.dtype == torch.uint8 and codes.dim() == 2 and codes.size(1) % 32 == 0,
        lambda: f"rosaq::pack: codes: got {codes.dtype} {tuple(codes.shape)}, need uint8 [n, k], k a multiple of 32",
    )
    return codes.new_empty((codes.size(0), codes.size(1) // 32 * bits), dtype=torch.int32)


@torch.library.register_fake("rosaq::unpack")
def _(qweight: Tensor, bits: int) -> Tensor:
    _check_qweight("unpack", qweight, bits)
    return qweight.new_empty((qweight.size(0), qweight.size(1) // bits * 32), dtype=torch.uint8)
