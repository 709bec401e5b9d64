"""One weight matrix (or several that share an input) to the tensors of the disk layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq.config import LinearFormat
from rosaq.layout import dequantize, pack, zero_bytes
from rosaq.quantizers.gptq import damping_term, order_columns, round_columns
from rosaq.quantizers.grid import Grid
from rosaq.quantizers.refine import beside_codes, refine, stored_weight
from rosaq.quantizers.row_feedback import RowFeedback
from rosaq.quantizers.rtn import rtn
from rosaq.quantizers.salient import salient_mask
from rosaq.rotation import inverse_transpose, leading_axes, principal_axes
from rosaq.specs import QuantSpec


def quantize_weight(
    weight: Tensor,
    gram: Tensor | None,
    spec: QuantSpec,
    salient_index: Tensor | None = None,
    feedback: RowFeedback | None = None,
) -> dict[str, Tensor]:
    """weight [n, k] float, gram [k, k] second moments of the inputs (None only for "rtn"), salient_index int64 [r]
    -> qweight, scales, zeros (asymmetric), salient_weight and salient_index (r > 0), as stored.

    Rows are independent given gram, so linears that share an input are stacked, quantised at once and cut again. With
    `feedback` ("gptq") they are rounded part after part, and later ones make up for the errors of earlier ones.

    Raises ValueError for NaN or Inf, for sizes that the format cannot hold, and for "gptq" without a gram: there is
    no silent round to nearest.
    """
    n, k = weight.shape
    r = 0 if salient_index is None else len(salient_index)
    LinearFormat(spec.bits, spec.group_size, spec.symmetric, r).check_sizes(k, n, "weight")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"weight [{n}, {k}]: got {int((~torch.isfinite(weight)).sum())} NaN or Inf, need finite numbers"
        )
    if gram is not None:
        _check_gram(gram, k)
    group_size = k if spec.group_size == -1 else spec.group_size
    salient = salient_mask(k, salient_index, weight.device)
    w = weight.detach().float()
    if spec.method == "gptq":
        if gram is None:
            raise ValueError("gram: got None, need second moments [k, k] of the inputs for method 'gptq'")
        codes, grid, salient_weight = _by_gptq(w, gram.double(), spec, group_size, salient, feedback)
    else:
        # a zero weight rounds to the code next to the zero point: silencing salient columns needs no other special case
        codes, grid = rtn(w.masked_fill(salient, 0.0), spec, group_size)
        salient_weight = w[:, salient]
    return _stored(codes, grid, spec, salient_weight, salient)


def _by_gptq(
    w: Tensor, gram: Tensor, spec: QuantSpec, group_size: int, salient: Tensor, feedback: RowFeedback | None
) -> tuple[Tensor, Grid, Tensor]:
    """(codes [n, k], grid, salient weights [n, r]) of w [n, k] float32, all rows at once or part after part."""
    columns = order_columns(gram, spec, group_size, salient)
    damped = gram.clone()
    torch.diagonal(damped).add_(damping_term(torch.diagonal(gram)[~salient].mean(), spec.damping))

    def rounded(rows: Tensor) -> tuple[Tensor, Grid, Tensor]:
        found = round_columns(rows, columns, spec, group_size)
        return refine(rows, damped, *found, salient, spec.bits, spec.refine) if spec.refine else found

    if feedback is None:
        return rounded(w)
    work, parts = w.clone(), feedback.parts()
    found = []
    for number, rows in enumerate(parts):
        found.append(rounded(work[rows]))
        feedback.carry(work, number, work[rows] - stored_weight(*found[-1], salient))
    back = torch.cat(parts).argsort()
    codes, grids, weights = zip(*found, strict=True)
    grid = Grid(torch.cat([g.scale for g in grids])[back], torch.cat([g.zero for g in grids])[back])
    return torch.cat(codes)[back], grid, torch.cat(weights)[back]


def quantize_with_basis(
    weight: Tensor, gram: Tensor, spec: QuantSpec, count: int, feedback: RowFeedback | None = None
) -> dict[str, Tensor]:
    """As `quantize_weight`, with `count` salient directions that are no channels: salient_basis float16 [k, count], the
    top eigenvectors U of gram, and salient_weight [n, count], the least-squares C = (W - Ŵ) G U (Uᵀ G U)⁻¹.

    What lies in the span of U is exact whatever Ŵ is, so the codes are chosen on what is left of the second moments.
    """
    _check_gram(gram, weight.shape[1])
    gram = gram.double()
    basis = leading_axes(gram, count).to(torch.float16)
    wide = basis.double()
    tensors = quantize_weight(weight, _without(gram, wide), spec, feedback=feedback)
    w_hat = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), spec.bits)
    cross = gram @ wide
    correction = (weight - w_hat).double() @ cross @ torch.linalg.pinv(wide.T @ cross, hermitian=True)
    return tensors | {"salient_weight": correction.to(torch.float16), "salient_basis": basis}


def _without(gram: Tensor, wide: Tensor) -> Tensor:
    """(I - P) G (I - P)ᵀ with P the projection on the columns of wide [k, r]: as three products of rank r, because
    matrices [k, k] of float64 are the largest that a run holds."""
    inverse = torch.linalg.pinv(wide)
    seen = inverse @ gram  # [r, k], P G = wide · seen
    return gram.addmm(wide, seen, alpha=-1).addmm_(seen.T - wide @ (seen @ inverse.T), wide.T, alpha=-1)


def quantize_in_axes(weight: Tensor, gram: Tensor, spec: QuantSpec, count: int) -> dict[str, Tensor]:
    """As `quantize_weight`, in principal axes: rotation float16 [1, k, k] holds the eigenvectors of gram, largest
    eigenvalue first, and the first `count` channels of t = x · rotation are salient (ROSAQ, per layer).

    The weight is turned by the inverse of the rotation as stored, so rounding that to float16 changes no result.
    """
    _check_gram(gram, weight.shape[1])
    gram = gram.double()
    rotation = principal_axes(gram)[1].to(torch.float16)
    wide = rotation.double()
    turned = (weight.double() @ inverse_transpose(rotation)).float()
    return quantize_weight(turned, wide.T @ gram @ wide, spec, torch.arange(count)) | {"rotation": rotation[None]}


def _check_gram(gram: Tensor, k: int) -> None:
    if gram.shape != (k, k):
        raise ValueError(f"gram: got shape {tuple(gram.shape)}, need ({k}, {k}) to match weight [n, k]")
    if not torch.isfinite(gram).all():
        raise ValueError(f"gram: got {int((~torch.isfinite(gram)).sum())} NaN or Inf entries, need finite numbers")


def _stored(codes: Tensor, grid: Grid, spec: QuantSpec, salient_weight: Tensor, salient: Tensor) -> dict[str, Tensor]:
    tensors = {"qweight": pack(codes.to(torch.uint8), spec.bits), "scales": grid.scale.to(torch.float16)}
    if not spec.symmetric:
        tensors["zeros"] = zero_bytes(grid.zero)
    if salient.any():
        tensors["salient_weight"] = beside_codes(codes, grid, salient_weight, salient)
        tensors["salient_index"] = torch.nonzero(salient).flatten().to(torch.int32)
    return tensors
