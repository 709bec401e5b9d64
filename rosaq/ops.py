"""The ops of rosaq: thin documented wrappers over `torch.ops.rosaq.*`, and their fakes for tracing.

m tokens, n out_features, k in_features, r salient directions, g groups per row. Errors from the ops are RuntimeError
and name the op, the argument, what it got and what it needs. The ops are for inference: they have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

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

MIN_CAPABILITY = (8, 0)
MAX_WEIGHTS = 8  # of one fused_gemms; kMaxWeights in csrc/cpu/gemm.h
# Looked up once: they are called for every layer of every token.
_fused_gemm, _fused_gemms = torch.ops.rosaq.fused_gemm.default, torch.ops.rosaq.fused_gemms.default
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_device(device: torch.device) -> None:
    """RuntimeError, with what to do about it, unless this build has kernels for `device` (the CPU always does)."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise RuntimeError(f"rosaq: device: got {device.type}, need cpu or cuda")
    if not _C.build_info()["cuda"]:
        raise RuntimeError(
            "rosaq: device: got cuda, but rosaq was built without CUDA; with nvcc on this machine, "
            "ROSAQ_BUILD=cuda pip install --force-reinstall --no-deps ., or load with device_map='cpu'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"rosaq: device: got {torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]}), "
            "need sm_80 or newer, or device_map='cpu'"
        )


def set_cpu_precision(name: str) -> None:
    """How the CPU kernels read activations, for the whole process; the environment variable is ROSAQ_CPU_PRECISION.

    "exact" (the default): as integers of 16 (bfloat16), 22 (float16) or 30 bits (float32) under the largest of 128
    channels. "int8": 8 bits under it, about 6e-3 relative error of y and up to four times as fast with many tokens; the
    portable kernels have no 8-bit product and stay exact. Weights are exact in both. ValueError for any other name.
    """
    _C.set_cpu_precision(name)


def prepack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Disk layout -> the opaque blob that `fused_gemm` reads.

    qweight int32 [n, k*bits/32], scales float16 or bfloat16 [n, g], zeros uint8 [n, g] (None: symmetric, codes stored
    offset by 2**(bits-1)), bits 3 or 4. n a multiple of 8, k of 32, k / g of 32. Returns uint8, 1-D; `unprepack` is
    its exact inverse. RuntimeError for any other shape, dtype or device.
    """
    return torch.ops.rosaq.prepack.default(qweight, scales, zeros, bits)  # type: ignore[no-any-return]


def unprepack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The blob of `prepack` -> (qweight, scales, zeros), bit for bit as they went in.

    Cannot be traced: the shapes of what it returns are in the blob's bytes. RuntimeError if `packed` is no whole blob.
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
    The result does not depend on the number of threads; few and many tokens take different paths, equal up to rounding.
    A token with an infinite or NaN channel gives NaN. RuntimeError for anything that does not fit.
    """
    return _fused_gemm(  # type: ignore[no-any-return]
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


def fused_gemms(
    x: Tensor,
    packed: list[Tensor],
    salient_weights: list[Tensor],
    salient_index: Tensor | None = None,
    salient_basis: Tensor | None = None,
    rotation: Tensor | None = None,
    biases: list[Tensor] | None = None,
    *,
    out_features: list[int],
    bits: int,
    group_size: int,
    symmetric: bool,
) -> list[Tensor]:
    """`fused_gemm` of one x with 1 to 8 weights, CPU only: the same bits, what is made of x made once.

    packed, out_features one a weight; salient_weights and biases too, or empty. The other arguments hold for all
    weights. RuntimeError for anything that does not fit.
    """
    return _fused_gemms(  # type: ignore[no-any-return]
        x,
        packed,
        salient_weights,
        salient_index,
        salient_basis,
        rotation,
        biases or [],
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


def _need(ok: bool | torch.SymBool, message: str) -> None:
    torch._check(ok, lambda: message)


def _check_bits(op: str, bits: int) -> None:
    _need(bits in SUPPORTED_BITS, f"rosaq::{op}: bits: got {bits}, need one of {SUPPORTED_BITS}")


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _fake_prepack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    k = _fake_unpack(qweight, bits, op="prepack").size(1)
    n, groups = qweight.size(0), scales.size(-1)
    _need(
        scales.dim() == 2 and scales.size(0) == n and groups > 0 and k % groups == 0,
        f"rosaq::prepack: scales: got {_shape(scales)}, need [{n}, k / group_size]",
    )
    if zeros is not None:
        _need(
            zeros.dtype == torch.uint8 and zeros.shape == scales.shape,
            f"rosaq::prepack: zeros: got {_shape(zeros)}, need uint8 {list(scales.shape)}",
        )
    packed_bytes = _C.packed_bytes(
        int(n),
        int(k),
        bits,
        int(k // groups),
        zeros is None,
        cuda=qweight.device.type == "cuda",
        bf16_scales=scales.dtype == torch.bfloat16,
    )
    return qweight.new_empty(packed_bytes, dtype=torch.uint8)


def _fake_unprepack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    raise NotImplementedError(
        f"rosaq::unprepack: packed: got a fake tensor {_shape(packed)}, need a real one: "
        "the output shapes are in its bytes, so the op cannot be traced"
    )


def _fake_fused_gemm(
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
    symmetric: bool,  # noqa: ARG001  (a fake has the arguments of its op)
) -> Tensor:
    op = "rosaq::fused_gemm"
    _check_bits("fused_gemm", bits)
    _need(group_size == -1 or group_size >= 32, f"{op}: group_size: got {group_size}, need 32 or more, or -1")
    _need(x.dtype in _FLOATS and x.dim() >= 1, f"{op}: x: got {_shape(x)}, need a 16 or 32-bit float [..., k]")
    _need(packed.dtype == torch.uint8 and packed.dim() == 1, f"{op}: packed: got {_shape(packed)}, need uint8, 1-D")
    if salient_weight is not None:
        one_of_two = (salient_index is None) != (salient_basis is None)
        _need(one_of_two, f"{op}: salient_weight: need exactly one of salient_index and salient_basis")
        fits = salient_weight.dim() == 2 and salient_weight.size(0) == out_features
        _need(fits, f"{op}: salient_weight: got {_shape(salient_weight)}, need [{out_features}, r]")
    if rotation is not None:
        square = rotation.dim() == 3 and rotation.size(1) == rotation.size(2)
        _need(square, f"{op}: rotation: got {_shape(rotation)}, need [B, b, b]")
    if bias is not None:
        _need(
            bias.dim() == 1 and bias.size(0) == out_features, f"{op}: bias: got {_shape(bias)}, need [{out_features}]"
        )
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_fused_gemms(
    x: Tensor,
    packed: list[Tensor],
    salient_weights: list[Tensor],
    salient_index: Tensor | None,
    salient_basis: Tensor | None,
    rotation: Tensor | None,
    biases: list[Tensor],
    out_features: list[int],
    bits: int,
    group_size: int,
    symmetric: bool,
) -> list[Tensor]:
    op, count = "rosaq::fused_gemms", len(packed)
    _need(1 <= count <= MAX_WEIGHTS, f"{op}: packed: got {count} weights, need 1 to {MAX_WEIGHTS}")
    _need(len(out_features) == count, f"{op}: out_features: got {len(out_features)}, need {count}, one for each weight")
    for name, tensors in (("salient_weights", salient_weights), ("biases", biases)):
        fits = len(tensors) in (0, count)
        _need(fits, f"{op}: {name}: got {len(tensors)}, need none or {count}, one for each weight")
    return [
        _fake_fused_gemm(
            x,
            packed[i],
            salient_weights[i] if salient_weights else None,
            salient_index,
            salient_basis,
            rotation,
            biases[i] if biases else None,
            out_features[i],
            bits,
            group_size,
            symmetric,
        )
        for i in range(count)
    ]


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    _check_bits("pack", bits)
    _need(
        codes.dtype == torch.uint8 and codes.dim() == 2 and codes.size(1) % 32 == 0,
        f"rosaq::pack: codes: got {_shape(codes)}, need uint8 [n, k] with k a multiple of 32",
    )
    return codes.new_empty((codes.size(0), codes.size(1) // 32 * bits), dtype=torch.int32)


def _fake_unpack(qweight: Tensor, bits: int, op: str = "unpack") -> Tensor:
    _check_bits(op, bits)
    _need(
        qweight.dtype == torch.int32 and qweight.dim() == 2 and qweight.size(1) % bits == 0,
        f"rosaq::{op}: qweight: got {_shape(qweight)}, need int32 [n, k * bits / 32]",
    )
    return qweight.new_empty((qweight.size(0), qweight.size(1) // bits * 32), dtype=torch.uint8)


_FAKES: dict[str, Callable[..., object]] = {
    "prepack": _fake_prepack,
    "unprepack": _fake_unprepack,
    "fused_gemm": _fake_fused_gemm,
    "fused_gemms": _fake_fused_gemms,
    "pack": _fake_pack,
    "unpack": _fake_unpack,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"rosaq::{_name}", _fake)
