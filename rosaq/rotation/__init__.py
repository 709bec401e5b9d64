"""Orthogonal maps of the activations and how they fold into weights."""

from rosaq.rotation.fit import StreamWeight, even_scales, fit_basis, fit_heads, start_basis
from rosaq.rotation.fuse import BlockRotations, fold_norms, rotate_block, rotate_rows, unit_gain
from rosaq.rotation.hadamard import hadamard, has_hadamard
from rosaq.rotation.orthogonal import (
    inverse_transpose,
    leading_axes,
    pca_random_tail,
    principal_axes,
    random_orthogonal,
    rotate_blocks,
    shared_hadamard_block,
)

__all__ = [
    "BlockRotations",
    "StreamWeight",
    "even_scales",
    "fit_basis",
    "fit_heads",
    "fold_norms",
    "hadamard",
    "has_hadamard",
    "inverse_transpose",
    "leading_axes",
    "pca_random_tail",
    "principal_axes",
    "random_orthogonal",
    "rotate_block",
    "rotate_blocks",
    "rotate_rows",
    "shared_hadamard_block",
    "start_basis",
    "unit_gain",
]
