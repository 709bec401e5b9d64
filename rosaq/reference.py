"""The one equation of rosaq in float64, the judge of every kernel. For tests and benchmarks; shares no kernel code.

t[m,k] = x[m,k] . blockdiag(rotation)
s[m,r] = t[:, salient_index]   or   t . salient_basis
y[m,n] = t . W^T + s . C^T + bias               W[n,k] = (codes - zero) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.layout import dequantize


def fused_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    salient_weight: Tensor | None = None,
    salient_index: Tensor | None = None,
    salient_basis: Tensor | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., k] and the tensors of one linear (disk layout, see `rosaq.ops.fused_gemm`) -> y float64 [..., n]."""
    t = x.double()
    if rotation is not None:
        b = rotation.size(-1)
        t = torch.einsum("...bi,bij->...bj", t.unflatten(-1, (-1, b)), rotation.double().expand(t.size(-1) // b, b, b))
        t = t.flatten(-2)
    y = t @ dequantize(qweight, scales, zeros, bits, torch.float64).T
    if salient_weight is not None:
        s = t[..., salient_index] if salient_index is not None else t @ salient_basis.double()  # type: ignore[union-attr]
        y = y + s @ salient_weight.double().T
    return y if bias is None else y + bias.double()
