"""The two 16-bit formats of the conformance cases, in numpy and exact fractions: conversions, one rounding, one fma."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt


def to_16(values: npt.NDArray[np.float64], is_bf16: bool) -> npt.NDArray[np.uint16]:
    """Values that both formats hold exactly, or that may be cut: for inputs only."""
    if is_bf16:
        return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def from_16(bits: npt.NDArray[np.uint16], is_bf16: bool) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # NaN
        if is_bf16:
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return bits.view(np.float16).astype(np.float64)


def rounded(exact: Fraction, sign_of_zero: float, is_bf16: bool) -> int:
    """Bits of the nearest number of the format, ties to even."""
    digits, least, largest = (8, -126, 127) if is_bf16 else (11, -14, 15)
    sign = 0x8000 if exact < 0 or (exact == 0 and np.signbit(sign_of_zero)) else 0
    size, exponent = abs(exact), least
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = round(size / Fraction(2) ** (exponent - digits + 1))  # Python rounds halves to even
    if units >= 2**digits:
        units, exponent = units // 2, exponent + 1
    if exponent > largest:
        return sign | (0x7F80 if is_bf16 else 0x7C00)
    biased = exponent - least + 1 if units >= 2 ** (digits - 1) else 0
    return sign | biased << (digits - 1) | units & (2 ** (digits - 1) - 1)


def fma(a: int, b: int, c: int, is_bf16: bool) -> int:
    """Bits of a b + c, rounded once; the NaN of the hardware is 0x7fff."""
    x, y, z = (float(from_16(np.array([v], np.uint16), is_bf16)[0]) for v in (a, b, c))
    with np.errstate(invalid="ignore"):
        plain = float(np.float64(x) * np.float64(y) + np.float64(z))
    if np.isnan(plain):
        return 0x7FFF
    if not np.isfinite([x, y, z]).all():
        return (0x8000 if plain < 0 else 0) | (0x7F80 if is_bf16 else 0x7C00)
    return rounded(Fraction(x) * Fraction(y) + Fraction(z), plain, is_bf16)
