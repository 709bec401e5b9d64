"""The checks that read tensors: one linear at a time, so that a model need not fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rosaq import ops
from rosaq.checkpoint import WeightReader
from rosaq.config import LinearFormat
from rosaq.layout import unpack, zero_points
from rosaq.linear import RosaqLinear
from rosaq.reference import fused_gemm
from rosaq.soundness import finite_problem, index_problem

# A rotation is stored in float16: a row of b entries is off by about b roundings of 2**-11 / sqrt(b).
ORTHOGONAL = 2.0**-7
# float32 activations in, float32 out: measured below 2**-18 on every kernel; a wrong one is off by a whole digit.
SAME_RESULT = 2.0**-12
TOKENS = 3
_ROWS_AT_ONCE = 8192  # of the reference: a head in float64 would be the largest matrix by far
_PER_ROW = ("qweight", "scales", "zeros", "salient_weight")


def read_linear(reader: WeightReader, name: str, fmt: LinearFormat, size: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of the linear `name` of size (n, k), without a bias."""
    n, k = size
    return {key: reader.get(f"{name}.{key}") for key in fmt.tensor_shapes(k, n)}


def value_problem(tensors: dict[str, Tensor], fmt: LinearFormat, in_features: int) -> str | None:
    """What is wrong with the numbers in `tensors`, which have the right shapes; None where nothing is."""
    for key, tensor in tensors.items():
        problem = finite_problem(tensor)
        if problem is not None:
            return f"{key}: {problem}"
    if not fmt.symmetric and (tensors["scales"] < 0).any():  # a symmetric grid's sign says where its extra level is
        return f"scales: got {float(tensors['scales'].min())}, need no negative step beside zero points"
    # The kernels take any byte, but whoever writes the format keeps zero points among the codes, as exports need them.
    if "zeros" in tensors and (most := float(zero_points(tensors["zeros"]).max())) > 2**fmt.bits - 1:
        return f"zeros: got a zero point of {most:g}, need at most {2**fmt.bits - 1}"
    if "rotation" in tensors:
        rotation = tensors["rotation"].double()
        worst = float((rotation @ rotation.mT - torch.eye(fmt.rotation_size, dtype=torch.float64)).abs().max())
        if worst > ORTHOGONAL:
            return f"rotation: got R Rᵀ off the identity by {worst:.2g}, need at most {ORTHOGONAL:.2g}"
    if "salient_index" in tensors:
        return _index_problem(tensors, fmt, in_features)
    return None


def _index_problem(tensors: dict[str, Tensor], fmt: LinearFormat, k: int) -> str | None:
    index = tensors["salient_index"].long()
    problem = index_problem(index, k)
    if problem is not None:
        return f"salient_index: {problem}"
    codes = unpack(tensors["qweight"], fmt.bits)[:, index].float()
    if "zeros" in tensors:
        zero = zero_points(tensors["zeros"])[:, index // fmt.group_size_of(k)]
    else:
        zero = torch.full_like(codes, 2 ** (fmt.bits - 1))
    num_bad = int(((codes - zero).abs() > 0.5).any(0).sum())
    if num_bad:
        return (
            f"qweight: got {num_bad} salient columns whose codes are not the zero point, need it or half a step off: "
            "salient_weight holds those columns"
        )
    return None


def result_error(tensors: dict[str, Tensor], fmt: LinearFormat, in_features: int, name: str) -> float:
    """How far the active kernel is from the float64 reference, relative to the largest result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, in_features, generator=generator)
    usual = ops.cpu_precision()
    ops.set_cpu_precision("exact")  # what int8 activations lose is no fault of the checkpoint
    try:
        got = RosaqLinear.from_tensors(tensors, fmt, name=name)(x).double()
    finally:
        ops.set_cpu_precision(usual)
    parts = []
    for start in range(0, got.shape[1], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = {key: tensor[rows] if key in _PER_ROW else tensor for key, tensor in tensors.items()}
        codes = (part.pop("qweight"), part.pop("scales"), part.pop("zeros", None))
        parts.append(fused_gemm(x, *codes, fmt.bits, **part))
    want = torch.cat(parts, 1)
    return float((got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
