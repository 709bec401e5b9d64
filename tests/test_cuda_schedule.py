"""How the CUDA kernels cut their work: pure host arithmetic, the same numbers that the device uses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from rosaq import _C


def schedule(m: int, n: int, k: int, resident: int, rows: int = 128, **options: Any) -> dict[str, Any]:
    request = {"r": 0, "has_basis": False, "has_rotation": False} | options
    return _C.cuda_schedule(m, n, k, rows=rows, resident=resident, **request)


def starts_of(made: dict[str, Any]) -> list[int]:
    """First K-tile of every block, and the end."""
    inside = [b * made["tiles_per_block"] + min(b, made["extra"]) for b in range(made["list_blocks"])]
    starts = [number * made["list_tiles"] + start for number in range(made["lists"]) for start in inside]
    return [*starts, made["lists"] * made["list_tiles"]]


@pytest.mark.parametrize("resident", [1, 7, 132, 528])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (576, 576), (4096, 4096), (14336, 4096), (128256, 8192)])
@pytest.mark.parametrize("r", [0, 3, 128])
def test_every_tile_has_one_block(n: int, k: int, r: int, resident: int) -> None:
    made = schedule(1, n, k, resident, r=r)
    assert made["row_tiles"] == -(-n // 128)
    assert made["k_tiles"] == -(-k // 128) + -(-r // 32)
    assert 1 <= made["grid"] <= resident
    starts = starts_of(made)
    assert len(starts) == made["grid"] + 1
    assert (starts[0], starts[-1]) == (0, made["row_tiles"] * made["k_tiles"])
    lengths = {b - a for a, b in pairwise(starts)}
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


def test_row_tiles_are_cut_alike_unless_that_leaves_blocks_idle() -> None:
    even = schedule(64, 4096, 4096, 132)
    assert (even["lists"], even["list_blocks"], even["tiles_per_block"]) == (32, 4, 8)
    one_list = schedule(64, 8960, 4096, 132)  # 70 row tiles: cut alike, half of the blocks would have nothing to do
    assert (one_list["lists"], one_list["list_blocks"]) == (1, 132)
    assert schedule(64, 128256, 4096, 132)["lists"] == 1  # more row tiles than blocks


@pytest.mark.parametrize(("m", "least"), [(1, 4), (16, 4), (17, 8), (64, 8)])
def test_blocks_are_not_split_too_finely(m: int, least: int) -> None:
    assert schedule(m, 4096, 4096, 10_000)["grid"] == 4096 * 4096 // 128 // 128 // least


@pytest.mark.parametrize(("m", "tokens"), [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (64, 64), (200, 64)])
def test_tokens_round_up_to_an_instance(m: int, tokens: int) -> None:
    assert schedule(m, 64, 64, 4)["tokens"] == tokens


def test_projection_is_cut_by_k_and_only_where_there_is_a_basis() -> None:
    assert schedule(1, 4096, 14336, 132, r=32)["projection_parts"] == 0
    assert schedule(1, 4096, 14336, 132, r=32, has_basis=True)["projection_parts"] == 16
    assert schedule(1, 4096, 1024, 132, r=32, has_basis=True)["projection_parts"] == 2
    assert schedule(1, 64, 64, 132, r=8, has_basis=True)["projection_parts"] == 1


def test_scratch_holds_what_the_kernel_writes() -> None:
    plain = schedule(16, 4096, 4096, 264)
    assert plain["scratch_bytes"] == plain["grid"] * 2 * 16 * 128 * 4
    rotated = schedule(16, 4096, 4096, 264, has_rotation=True)
    assert rotated["scratch_bytes"] == plain["scratch_bytes"] + 16 * 4096 * 2


@pytest.mark.parametrize(("rows", "resident"), [(0, 1), (128, 0)])
def test_nonsense_is_refused(rows: int, resident: int) -> None:
    with pytest.raises(ValueError, match="need at least 1"):
        schedule(1, 64, 64, resident, rows)


def test_blob_sizes_tell_layouts_apart() -> None:
    """A CUDA blob is never as long as a CPU blob, nor as one with scales of the other dtype."""
    cpu = _C.packed_bytes(4096, 4096, 3, 128, True)
    f16 = _C.packed_bytes(4096, 4096, 3, 128, True, cuda=True)
    bf16 = _C.packed_bytes(4096, 4096, 3, 128, True, cuda=True, bf16_scales=True)
    assert len({cpu, f16, bf16}) == 3
    assert (cpu % 64, f16 % 64, bf16 % 64) == (0, 16, 32)
    assert f16 < cpu + 4096  # three bits stay three bits
    with pytest.raises(ValueError, match="group_size: got 96 for k 192, need 32, 64, 128 or k on CUDA"):
        _C.packed_bytes(8, 192, 3, 96, True, cuda=True)
