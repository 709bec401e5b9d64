"""The ops of rosaq: thin documented wrappers over `torch.ops.rosaq.*` (their fakes for tracing: `rosaq/fakes.py`).

m tokens, n out_features, k in_features, r salient directions, g groups per row. Errors from the ops are RuntimeError
and name the op, the argument, what it got and what it needs. The ops have no gradient; `RosaqLinear`
has that of its input.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

try:
    from rosaq import _C as _C
except ImportError as error:
    is_source = Path(__file__).parent.parent.joinpath("csrc").is_dir()
    what = "build it with `pip install .` in the source tree"
    if is_source:
        what = "this is the source tree, which hides an installed rosaq: leave it, or build it here, `pip install -e .`"
    raise ImportError(f"rosaq._C (the compiled kernels) cannot be loaded: {what}. The loader said: {error}") from error

from rosaq.fakes import MAX_PANEL as MAX_PANEL
from rosaq.fakes import MAX_WEIGHTS as MAX_WEIGHTS

MIN_CAPABILITY = (8, 0)
# Looked up once: they are called for every layer of every token.
_fused_gemm, _fused_gemms = torch.ops.rosaq.fused_gemm.default, torch.ops.rosaq.fused_gemms.default


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


def has_kernels(device: torch.device) -> bool:
    """Whether `check_device` lets `device` pass."""
    if device.type != "cuda":
        return device.type == "cpu"
    return bool(_C.build_info()["cuda"]) and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def set_cpu_precision(name: str) -> None:
    """How the CPU kernels read activations, for the whole process; the environment variable is ROSAQ_CPU_PRECISION.

    "exact" (the default): as integers of 16 (bfloat16), 22 (float16) or 30 bits (float32) under the largest of 128
    channels. "int8": 8 bits under it, about 6e-3 relative error of y and up to four times as fast with many tokens; the
    portable kernels have no 8-bit product and stay exact. Weights are exact in both. ValueError for any other name.
    """
    _C.set_cpu_precision(name)


def cpu_precision() -> str:
    """What `set_cpu_precision` was told last, "exact" or "int8"."""
    return str(_C.cpu_precision())


def prepack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Disk layout -> the opaque blob that `fused_gemm` reads.

    qweight int32 [n, k*bits/32], scales float16 or bfloat16 [n, g], zeros uint8 [n, g] (None: symmetric, codes stored
    offset by 2**(bits-1)), bits 3 or 4. A zero point is bits 0-6 of its byte, and bit 7 is one half. n a multiple of 8,
    k of 32, k / g of 32. Returns uint8, 1-D; `unprepack` is its exact inverse. RuntimeError for any other shape, dtype
    or device.
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
    On a GPU x has 16 bits, group_size is 32, 64, 128 or k, and b a multiple of 16.
    The result does not depend on the number of threads; few and many tokens take different paths, equal up to rounding.
    A token with an infinite or NaN channel gives nothing finite. On a GPU, from 129 tokens on, the two products are
    rounded to x's dtype before they are added where there is a basis: either may overflow float16. RuntimeError for
    anything that does not fit.
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


def round_panel(columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ inside a panel of p columns of a weight (1 to 128), all n rows at once -> (codes, errors), both [p, n].

    columns [p, n], row j being column j of the weight; factor [p, p], of which the upper triangle counts; scale and
    zero [n], one grid for the panel; bits 3 or 4. All float32, and so are the codes. For j = 0, 1, ...:

        codes[j]    = clamp(round(columns[j] / scale + zero), 0, 2**bits - 1)       half to even
        errors[j]   = (columns[j] - (codes[j] - zero) * scale) / factor[j, j]
        columns[i] -= factor[j, i] * errors[j]    for i > j, in a copy

    Every product, sum and quotient is rounded on its own and in this order: the same bits on every device and
    instruction set. The PyTorch equivalent is `rosaq.quantizers.panels.round_by_columns`. RuntimeError for anything
    that does not fit.
    """
    return torch.ops.rosaq.round_panel.default(columns, factor, scale, zero, bits)  # type: ignore[no-any-return]


def sweep_panel(
    slope: Tensor, codes: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent over the codes of a panel of p columns (1 to 128), all n rows at once -> (codes, moves), both
    [p, n].

    slope [p, n], half the gradient of the loss; codes [p, n] so far; gram [p, p] symmetric; scale and zero [p, n]; bits
    3 or 4. All float32. For j = 0, 1, ..., with w = (codes[j] - zero[j]) * scale[j]:

        best      = clamp(round((w - slope[j] / gram[j, j]) / scale[j] + zero[j]), 0, 2**bits - 1)
        moves[j]  = (best - codes[j]) * scale[j]
        slope[i] += gram[j, i] * moves[j]    for i > j, in a copy

    Bits as in `round_panel`. The PyTorch equivalent is `rosaq.quantizers.panels.sweep_by_columns`. RuntimeError for
    anything that does not fit.
    """
    return torch.ops.rosaq.sweep_panel.default(slope, codes, gram, scale, zero, bits)  # type: ignore[no-any-return]
