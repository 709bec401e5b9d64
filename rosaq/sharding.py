"""Tensor parallelism: how the tensors of one linear are cut between ranks, so that the usual communication is enough.

Everything after x is linear (DESIGN.md, "One equation"). Cut along "out", a rank holds some rows of Ŵ and C and gives
its part of y. Cut along "in", it holds some channels of t, with their groups, rotation blocks and salient directions,
and gives a partial sum of all of y: rotation blocks and groups must not cross a border.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from rosaq.config import LinearFormat

Cut = Literal["out", "in"]
MAX_RANKS = 64

_OUT_DIMS = {"qweight": 0, "scales": 0, "zeros": 0, "salient_weight": 0, "bias": 0}
_IN_DIMS = {"qweight": 1, "scales": 1, "zeros": 1, "salient_basis": 0, "rotation": 0}


class Piece(NamedTuple):
    """Rank `rank` of `num_ranks`, of a linear that is cut along `cut`."""

    cut: Cut
    rank: int
    num_ranks: int


def cut_dim(name: str, fmt: LinearFormat, cut: Cut) -> int | None:
    """The dimension along which tensor `name` of a linear is cut; None where every rank holds all of it.

    `salient_index` and, along "in", `salient_weight` come whole and are cut by value: see `take_salient`.
    """
    if cut == "out":
        return _OUT_DIMS.get(name)
    is_shared = (name in ("scales", "zeros") and fmt.group_size == -1) or (
        name == "rotation" and fmt.rotation_blocks == 1
    )
    return None if is_shared else _IN_DIMS.get(name)


def problem(fmt: LinearFormat, in_features: int, out_features: int, cut: Cut, num_ranks: int) -> str | None:
    """Why a linear of this format cannot be cut between `num_ranks`; None where it can."""
    if cut == "out":
        return None if out_features % (8 * num_ranks) == 0 else f"out_features {out_features} is no multiple of 8"
    k = in_features
    if k % (32 * num_ranks):
        return f"in_features {k} is no multiple of 32"
    if fmt.group_size != -1 and k // fmt.group_size % num_ranks:
        return f"in_features {k} is no multiple of the group size {fmt.group_size}"
    if fmt.rotation_size and k // fmt.rotation_size % num_ranks:
        return f"in_features {k} is no multiple of the rotation block {fmt.rotation_size}"
    return None


def check_cut(
    fmt: LinearFormat, in_features: int, out_features: int, cut: Cut, num_ranks: int, *, name: str = "linear"
) -> None:
    """Raise ValueError, with the sizes that do work, unless the linear can be cut between `num_ranks`."""
    why = problem(fmt, in_features, out_features, cut, num_ranks)
    if why is not None:
        sizes = allowed_sizes([(fmt, in_features, out_features, cut)])
        raise ValueError(
            f"{name}: tensor parallel size: got {num_ranks}, need one of {list(sizes)}: {why} times {num_ranks}"
        )


def allowed_sizes(linears: Iterable[tuple[LinearFormat, int, int, Cut]]) -> tuple[int, ...]:
    """The numbers of ranks, up to MAX_RANKS, that every (format, in_features, out_features, cut) can be cut between."""
    linears = set(linears)
    return tuple(
        num_ranks
        for num_ranks in range(1, MAX_RANKS + 1)
        if all(problem(*linear, num_ranks) is None for linear in linears)
    )


def take_salient(tensors: dict[str, Tensor], fmt: LinearFormat, start: int, stop: int) -> LinearFormat:
    """Keep, in place, the salient channels in [start, stop) of t, counted from `start`; returns the format of the rest.

    Nothing to do for a basis, whose rows are cut and whose columns every rank needs.
    """
    if not fmt.num_salient or fmt.salient == "basis":
        return fmt
    index = tensors["salient_index"]
    mine = (index >= start) & (index < stop)
    num_salient = int(mine.sum())
    if num_salient:
        tensors["salient_index"] = index[mine] - start
        tensors["salient_weight"] = tensors["salient_weight"][:, mine].contiguous()
    else:
        del tensors["salient_index"], tensors["salient_weight"]
    return replace(fmt, num_salient=num_salient)


def shard_format(fmt: LinearFormat, piece: Piece) -> LinearFormat:
    """The format of one rank's tensors, before `take_salient`."""
    if piece.cut == "in" and fmt.rotation_blocks > 1:
        return replace(fmt, rotation_blocks=fmt.rotation_blocks // piece.num_ranks)
    return fmt


def cut_linear(
    tensors: dict[str, Tensor], fmt: LinearFormat, piece: Piece, *, name: str = "linear"
) -> tuple[dict[str, Tensor], LinearFormat]:
    """All tensors of a linear (disk layout) -> one rank's tensors and their format.

    Along "in" the bias goes to rank 0 alone, so that the sum of the parts is y. ValueError as `check_cut` tells.
    """
    n, k = tensors["qweight"].shape[0], tensors["qweight"].shape[1] * 32 // fmt.bits
    check_cut(fmt, k, n, piece.cut, piece.num_ranks, name=name)
    mine = {}
    for key, tensor in tensors.items():
        dim = cut_dim(key, fmt, piece.cut)
        mine[key] = tensor if dim is None else tensor.chunk(piece.num_ranks, dim)[piece.rank].contiguous()
    fmt = shard_format(fmt, piece)
    if piece.cut == "in":
        width = k // piece.num_ranks
        fmt = take_salient(mine, fmt, piece.rank * width, (piece.rank + 1) * width)
        if piece.rank:
            mine.pop("bias", None)
    return mine, fmt
