"""What the ops make, without making it: shapes and the same errors, for torch.compile and friends.

Registered when `rosaq.ops` is imported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rosaq import _C
from rosaq.config import SUPPORTED_BITS

MAX_PANEL = 128  # columns of one round_panel; kMaxPanel in csrc/common/params_rounding.h
MAX_WEIGHTS = 8  # of one fused_gemms; kMaxWeights in csrc/cpu/gemm.h
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _need(ok: bool | torch.SymBool, message: str) -> None:
    torch._check(ok, lambda: message)


def _check_bits(op: str, bits: int) -> None:
    _need(bits in SUPPORTED_BITS, f"rosaq::{op}: bits: got {bits}, need one of {SUPPORTED_BITS}")


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def prepack(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    k = unpack(qweight, bits, op="prepack").size(1)
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


def unprepack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    raise NotImplementedError(
        f"rosaq::unprepack: packed: got a fake tensor {_shape(packed)}, need a real one: "
        "the output shapes are in its bytes, so the op cannot be traced"
    )


def fused_gemm(
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


def fused_gemms(
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
        fused_gemm(
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


def pack(codes: Tensor, bits: int) -> Tensor:
    _check_bits("pack", bits)
    _need(
        codes.dtype == torch.uint8 and codes.dim() == 2 and codes.size(1) % 32 == 0,
        f"rosaq::pack: codes: got {_shape(codes)}, need uint8 [n, k] with k a multiple of 32",
    )
    return codes.new_empty((codes.size(0), codes.size(1) // 32 * bits), dtype=torch.int32)


def unpack(qweight: Tensor, bits: int, op: str = "unpack") -> Tensor:
    _check_bits(op, bits)
    _need(
        qweight.dtype == torch.int32 and qweight.dim() == 2 and qweight.size(1) % bits == 0,
        f"rosaq::{op}: qweight: got {_shape(qweight)}, need int32 [n, k * bits / 32]",
    )
    return qweight.new_empty((qweight.size(0), qweight.size(1) // bits * 32), dtype=torch.uint8)


def _check_panel(op: str, name: str, panel: Tensor) -> None:
    fits = panel.dtype == torch.float32 and panel.dim() == 2 and 1 <= panel.size(0) <= MAX_PANEL
    _need(fits, f"{op}: {name}: got {_shape(panel)}, need float32 [p, n] with p from 1 to {MAX_PANEL}")


def _check_float(op: str, name: str, tensor: Tensor, want: tuple[int | torch.SymInt, ...]) -> None:
    fits = tensor.dtype == torch.float32 and tensor.shape == want
    _need(fits, f"{op}: {name}: got {_shape(tensor)}, need float32 {list(want)}")


def round_panel(columns: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    op = "rosaq::round_panel"
    _check_bits("round_panel", bits)
    _check_panel(op, "columns", columns)
    p, n = columns.shape
    for name, tensor, want in (("factor", factor, (p, p)), ("scale", scale, (n,)), ("zero", zero, (n,))):
        _check_float(op, name, tensor, want)
    return columns.new_empty((p, n)), columns.new_empty((p, n))


def sweep_panel(
    slope: Tensor, codes: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    op = "rosaq::sweep_panel"
    _check_bits("sweep_panel", bits)
    _check_panel(op, "slope", slope)
    p, n = slope.shape
    for name, tensor, want in (("codes", codes, (p, n)), ("gram", gram, (p, p)), ("scale", scale, (p, n))):
        _check_float(op, name, tensor, want)
    _check_float(op, "zero", zero, (p, n))
    return slope.new_empty((p, n)), slope.new_empty((p, n))


_ALL: dict[str, Callable[..., object]] = {
    "prepack": prepack,
    "unprepack": unprepack,
    "fused_gemm": fused_gemm,
    "fused_gemms": fused_gemms,
    "pack": pack,
    "unpack": unpack,
    "round_panel": round_panel,
    "sweep_panel": sweep_panel,
}
for _name, _fake in _ALL.items():
    torch.library.register_fake(f"rosaq::{_name}", _fake)
