"""rosaq.sharding: the parts of a linear add up to it, and what cannot be cut is refused with the sizes that can."""

import pytest
import torch

from rosaq.config import LinearFormat
from rosaq.reference import fused_gemm
from rosaq.sharding import Piece, allowed_sizes, check_cut, cut_linear
from tests.models import random_linear
from tests.tolerances import assert_tight

FORMATS = {
    "plain": LinearFormat(4, 32),
    "symmetric-one-group": LinearFormat(3, -1, symmetric=True),
    "index": LinearFormat(3, 32, num_salient=5),
    "basis": LinearFormat(4, 32, num_salient=4, salient="basis"),
    "shared-rotation-index": LinearFormat(3, 64, num_salient=3, rotation_blocks=1, rotation_size=32),
    "own-rotations-basis": LinearFormat(3, 32, num_salient=2, salient="basis", rotation_blocks=8, rotation_size=32),
}
N, K = 32, 256


def compute(tensors, fmt, x):
    return fused_gemm(x, tensors.pop("qweight"), tensors.pop("scales"), tensors.pop("zeros", None), fmt.bits, **tensors)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("cut", ["out", "in"])
def test_parts_add_up_to_the_whole(name, num_ranks, cut):
    fmt, x = FORMATS[name], torch.randn(3, K, dtype=torch.float64)
    whole = random_linear(fmt, N, K, seed=1, bias=True)
    if fmt.salient == "index" and fmt.num_salient:
        # one rank without any of them: its format must say so
        whole["salient_index"] = torch.arange(fmt.num_salient, dtype=torch.int32) * 7
    parts = []
    for rank in range(num_ranks):
        tensors, local = cut_linear(whole, fmt, Piece(cut, rank, num_ranks))
        shapes = local.tensor_shapes(K // (num_ranks if cut == "in" else 1), len(tensors["qweight"]), bias=True)
        assert {key: (tuple(t.shape), str(t.dtype)[6:]) for key, t in tensors.items()}.items() <= shapes.items()
        mine = x if cut == "out" else x.chunk(num_ranks, 1)[rank]
        parts.append(compute(tensors, local, mine))
    got = torch.cat(parts, 1) if cut == "out" else sum(parts)
    assert_tight(got, compute(dict(whole), fmt, x))


@pytest.mark.parametrize(
    ("fmt", "cut", "num_ranks", "message"),
    [
        (LinearFormat(3, 64), "out", 3, r"got 3, need one of \[1, 2, 4\]: out_features 32 is no multiple of 8"),
        (LinearFormat(3, 64), "in", 3, r"got 3, need one of \[1, 2, 4\]: in_features 256 is no multiple of 32"),
        (
            LinearFormat(3, 128),
            "in",
            4,
            r"got 4, need one of \[1, 2\]: .* no multiple of the group size 128",
        ),
        (
            LinearFormat(3, 32, rotation_blocks=1, rotation_size=256),
            "in",
            2,
            r"got 2, need one of \[1\]: .* rotation",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(fmt, cut, num_ranks, message):
    with pytest.raises(ValueError, match=f"o_proj: tensor parallel size: {message}"):
        check_cut(fmt, K, N, cut, num_ranks, name="o_proj")
    with pytest.raises(ValueError, match="got"):
        cut_linear(random_linear(fmt, N, K, seed=0), fmt, Piece(cut, 0, num_ranks))


def test_allowed_sizes_fit_every_linear():
    fmt = LinearFormat(3, 64)
    assert allowed_sizes([(fmt, 4096, 4096, "in"), (fmt, 4096, 14336, "out")]) == (1, 2, 4, 8, 16, 32, 64)
    assert allowed_sizes([(fmt, 576, 576, "in"), (fmt, 1536, 576, "in")]) == (1, 3)
