"""Fold norms and rotations into the weights of one block, exactly: the block computes the same function.

Everything is float64 here; the results are rounded once, to float32. Weights are [out, in]; a rotation R acts on
row vectors, x' = x R.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rosaq.models import Family, Sizes
from rosaq.rotation.orthogonal import inverse_transpose, rotate_blocks

Tensors = dict[str, Tensor]
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class BlockRotations:
    """The rotations of one block. residual [d, d] and values [num_kv_heads, head_dim, head_dim] are float64 and
    folded, None: identity. residual is orthogonal, values may be any invertible matrices. online: {site name: [B, b, b]
    float16}, applied to the site's input when it runs. gains: {norm: [d] float64}, what the norm multiplies the
    channels of the rotated stream by, and the linears behind it divide them by; none for 1."""

    residual: Tensor | None = None
    values: Tensor | None = None
    online: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)


def fold_norms(block: Tensors, family: Family) -> Tensors:
    """Multiply each norm's gain into the weights behind it, quantised or kept, and set the gain to one.
    block: {name: tensor}."""
    out = dict(block)
    for site in family.sites:
        if site.norm:
            gain = block[f"{site.norm}.weight"].double() + family.gain_offset
            for reader in site.linears + site.kept:
                out[f"{reader}.weight"] = (block[f"{reader}.weight"].double() * gain).float()
            out[f"{site.norm}.weight"] = unit_gain(block[f"{site.norm}.weight"], family)
    return out


def unit_gain(weight: Tensor, family: Family) -> Tensor:
    """The weight of a norm of the shape of `weight` that multiplies by one."""
    return torch.full_like(weight, 1 - family.gain_offset)


def rotate_block(block: Tensors, rotations: BlockRotations, family: Family, sizes: Sizes) -> Tensors:
    """Rotate a block whose norms are folded. Returns new float32 tensors; `block` is not changed."""
    turned = {*family.linears, *(reader for site in family.sites for reader in site.kept)}
    wide = {name: tensor.double() for name, tensor in block.items() if name.rpartition(".")[0] in turned}
    if rotations.residual is not None:
        for site in family.sites_reading("residual"):
            gain = rotations.gains.get(site.norm)
            for reader in site.linears + site.kept:
                turn = rotations.residual if gain is None else rotations.residual / gain
                wide[f"{reader}.weight"] = wide[f"{reader}.weight"] @ turn
        for linear in family.writers:
            wide[f"{linear}.weight"] = rotations.residual.T @ wide[f"{linear}.weight"]
            if f"{linear}.bias" in wide:
                wide[f"{linear}.bias"] = wide[f"{linear}.bias"] @ rotations.residual
    if rotations.values is not None:
        _rotate_values(wide, rotations.values, family, sizes)
    for site in family.sites:
        if site.name in rotations.online:
            back = inverse_transpose(rotations.online[site.name])
            for linear in site.linears:
                wide[f"{linear}.weight"] = rotate_blocks(wide[f"{linear}.weight"], back)
    norms = {f"{norm}.weight": (gain - family.gain_offset).float() for norm, gain in rotations.gains.items()}
    return {name: wide[name].float() if name in wide else tensor for name, tensor in (block | norms).items()}


def _rotate_values(wide: Tensors, rotation: Tensor, family: Family, sizes: Sizes) -> None:
    """Turn every value head, v' = v T: v_proj's output rows (and bias), and by T⁻ᵀ the same head's columns of its
    reader."""
    heads = (sizes.num_kv_heads, sizes.head_dim)
    value = wide[f"{family.value}.weight"].unflatten(0, heads)  # [kv, head_dim, hidden]
    wide[f"{family.value}.weight"] = (rotation.transpose(1, 2) @ value).flatten(0, 1)
    if f"{family.value}.bias" in wide:
        bias = wide[f"{family.value}.bias"].unflatten(0, heads)
        wide[f"{family.value}.bias"] = torch.einsum("hi,hij->hj", bias, rotation).flatten()
    back = inverse_transpose(rotation)
    per_head = back.repeat_interleave(sizes.num_heads // sizes.num_kv_heads, dim=0)  # grouped queries share it
    for site in family.sites_reading("values"):
        for linear in site.linears:
            wide[f"{linear}.weight"] = rotate_blocks(wide[f"{linear}.weight"], per_head)


def rotate_rows(rows: Tensor, residual: Tensor | None, gain: Tensor | None = None) -> Tensor:
    """Rows of the embedding or the head [vocab, d] in the rotated stream, (rows * gain) R, float32. The final norm's
    gain folds into the head, which unties it from the embedding. In chunks: float64 doubles a large vocabulary."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE].double()
        if gain is not None:
            part = part * gain.double()
        out[start : start + _ROWS_AT_ONCE] = part if residual is None else part @ residual
    return out
