"""The engine-side linear: fused parts in one launch where they agree, cut for any rank, without any engine."""

import pytest
import torch

from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.integrations.vllm_linear import FusedLinear, Part, parts_of
from rosaq.reference import fused_gemm
from tests.models import random_linear
from tests.tolerances import assert_close_in

K = 128
ROWS = {"q": 64, "k": 32, "v": 32}
INDEX = LinearFormat(3, 32, num_salient=4)
ROTATED = LinearFormat(4, 32, num_salient=3, salient="basis", rotation_blocks=1, rotation_size=32)


def linears(formats, *, shared=True):
    """Disk tensors of q, k and v; with `shared`, one salient set and one rotation for all."""
    made = {q: random_linear(fmt, ROWS[q], K, seed) for seed, (q, fmt) in enumerate(formats.items())}
    if shared:
        for tensors in made.values():
            tensors |= {key: t for key, t in made["q"].items() if key in tensors and key.endswith(("index", "basis"))}
            tensors |= {key: t for key, t in made["q"].items() if key in tensors and key == "rotation"}
    return made


def reference(tensors, fmt, x, bias=None):
    tensors = dict(tensors)
    codes = (tensors.pop("qweight"), tensors.pop("scales"), tensors.pop("zeros", None))
    return fused_gemm(x, *codes, fmt.bits, bias=bias, **tensors)


def load(made, formats, rank=0, num_ranks=1, replicas=1):
    """The fused layer of one rank; k and v heads are held by `replicas` ranks each."""
    held = {q: ROWS[q] // num_ranks * (1 if q == "q" else replicas) for q in made}
    parts = [Part(f"attn.{q}_proj", formats[q], held[q]) for q in made]
    fused = FusedLinear(parts, in_features=K, held_in_features=K, rank=rank, num_ranks=num_ranks)
    for q, tensors in made.items():
        for key, tensor in tensors.items():
            fused.load(key, tensor, q, torch.device("cpu"))
    fused.pack()
    return fused


@pytest.mark.parametrize("fmt", [INDEX, ROTATED, LinearFormat(4, -1, symmetric=True)])
@pytest.mark.parametrize(("num_ranks", "replicas"), [(1, 1), (2, 1), (4, 2)])
def test_fused_parts_that_share_everything_are_one_launch(fmt, num_ranks, replicas):
    formats = dict.fromkeys(ROWS, fmt)
    made, x, bias = linears(formats), torch.randn(5, K), torch.randn(128)
    for rank in range(num_ranks):
        fused = load(made, formats, rank, num_ranks, replicas)
        assert len(fused.launches) == 1
        want = []
        for q, tensors in made.items():
            y = reference(tensors, fmt, x)
            pieces = num_ranks // (1 if q == "q" else replicas)
            want.append(y.chunk(pieces, 1)[rank * pieces // num_ranks])
        want = torch.cat(want, 1)
        b = bias[: want.shape[1]].clone()
        assert_close_in(fused(x, b), want + b, torch.float32)
        assert_close_in(fused(x, None), want, torch.float32)


MIXED = {
    "other bits": ({"q": INDEX, "k": INDEX, "v": LinearFormat(4, 32, num_salient=4)}, True, 2),
    "other group size": ({"q": INDEX, "k": LinearFormat(3, 64, num_salient=4), "v": INDEX}, True, 3),
    "other salient channels": (dict.fromkeys(ROWS, INDEX), False, 3),
    "other rotation": (dict.fromkeys(ROWS, ROTATED), False, 3),
}


@pytest.mark.parametrize("case", MIXED)
def test_parts_that_differ_are_launched_apart_and_are_right(case):
    formats, shared, num_launches = MIXED[case]
    made, x, bias = linears(formats, shared=shared), torch.randn(3, K), torch.randn(128)
    fused = load(made, formats)
    assert len(fused.launches) == num_launches
    want = torch.cat([reference(tensors, formats[q], x) for q, tensors in made.items()], 1)
    assert_close_in(fused(x, bias), want + bias, torch.float32)


@pytest.mark.parametrize("fmt", [INDEX, ROTATED])
def test_ranks_of_a_row_parallel_layer_add_up(fmt):
    tensors, x = random_linear(fmt, 64, K, seed=3), torch.randn(4, K)
    parts = []
    for rank in range(2):
        part = Part("o_proj", fmt, 64)
        fused = FusedLinear([part], in_features=K, held_in_features=K // 2, rank=rank, num_ranks=2)
        for key, tensor in tensors.items():
            fused.load(key, tensor, None, torch.device("cpu"))
        fused.pack()
        parts.append(fused(x.chunk(2, 1)[rank].contiguous(), None))
    assert_close_in(sum(parts), reference(tensors, fmt, x), torch.float32)


def fused_on_disk(whole, rows, rank, num_ranks):
    """The layer of one rank; the checkpoint has one linear "qkv_proj" for all parts, of which it holds `rows`."""
    parts = parts_of(CheckpointConfig(INDEX), "attn.qkv_proj", ["attn.qkv_proj"], rows)
    fused = FusedLinear(parts, in_features=K, held_in_features=K, rank=rank, num_ranks=num_ranks)
    for key, tensor in whole.items():
        fused.load(key, tensor, None, torch.device("cpu"))
    fused.pack()
    return fused


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_weights_fused_on_disk_are_cut_part_by_part(num_ranks):
    whole, x = random_linear(INDEX, 128, K, seed=5), torch.randn(3, K)
    parts = reference(whole, INDEX, x).split(list(ROWS.values()), 1)
    for rank in range(num_ranks):
        fused = fused_on_disk(whole, [rows // num_ranks for rows in ROWS.values()], rank, num_ranks)
        assert len(fused.launches) == 1
        want = torch.cat([part.chunk(num_ranks, 1)[rank] for part in parts], 1)
        assert_close_in(fused(x, None), want, torch.float32)


def test_parts_are_named_as_in_the_checkpoint():
    config = CheckpointConfig(INDEX, modules={"k_proj": ROTATED})
    parts = parts_of(config, "attn.qkv_proj", ["attn.q_proj", "attn.k_proj"], [64, 32])
    assert [(part.name, part.format, part.held_out_features) for part in parts] == [
        ("attn.q_proj", INDEX, 64),
        ("attn.k_proj", ROTATED, 32),
    ]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_ranks_that_share_heads_of_a_linear_fused_on_disk_are_refused():
    whole = random_linear(INDEX, 128, K, seed=5)
    with pytest.raises(ValueError, match=r"qkv_proj.qweight: got 128 rows, need 80 for each of 2 ranks"):
        fused_on_disk(whole, [32, 24, 24], 0, 2)
    with pytest.raises(ValueError, match=r"qkv_proj: got 3 parts, need those of \['q', 'k'\]"):
        parts_of(CheckpointConfig(INDEX), "qkv_proj", ["q", "k"], [8, 8, 8])


@pytest.mark.parametrize(
    ("rows", "num_ranks", "held_in_features", "message"),
    [
        (128, 1, K, "got 128 rows, need 64 for each of 1 ranks"),
        (192, 2, K, "got 192 rows, need 64 for each of 2 ranks"),
        (192, 4, K, "got 192 rows, need 64 for each of 4 ranks"),
        (128, 2, K // 2, "got 128 rows, need 64 for each of 1 ranks"),  # cut along its columns
    ],
)
@pytest.mark.parametrize("key", ["qweight", "scales", "zeros", "salient_weight"])
def test_rows_that_no_rank_would_hold_are_refused(rows, num_ranks, held_in_features, message, key):
    sizes = {"in_features": K, "held_in_features": held_in_features}
    fused = FusedLinear([Part("o_proj", INDEX, 64)], rank=0, num_ranks=num_ranks, **sizes)
    with pytest.raises(ValueError, match=rf"^o_proj.{key}: {message}"):
        fused.load(key, random_linear(INDEX, rows, K, seed=0)[key], None, torch.device("cpu"))


def test_missing_tensor_is_named():
    formats = dict.fromkeys(ROWS, INDEX)
    made = linears(formats)
    del made["k"]["scales"]
    with pytest.raises(ValueError, match=r"attn.k_proj.scales: got no such tensor in the checkpoint"):
        load(made, formats)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zeros", torch.zeros(64, 4, dtype=torch.int8), "zeros: got int8"),
        ("scales", torch.full((64, 4), torch.nan).half(), "scales: got 256 NaN or Inf"),
        ("scales", torch.ones(64, 2).half(), r"scales: got float16 \[64, 2\], need float16 \[64, 4\]"),
        ("salient_index", torch.tensor([0, 1, 2, K], dtype=torch.int32), "salient_index: got 4 different channels"),
        ("rotation", torch.eye(32).half()[None], "rotation: got .* need no such tensor by config.json"),
    ],
)
def test_unsound_tensor_is_named(key, value, message):
    formats = {"q": INDEX}
    made = linears(formats)
    made["q"][key] = value
    with pytest.raises(ValueError, match=f"attn.q_proj.{message}"):
        load(made, formats)


@pytest.mark.parametrize(
    ("num_ranks", "allowed", "message"),
    [
        (3, (1, 2), r"o_proj: tensor parallel size: got 3, need one of \[1, 2\]"),
        (4, (), r"o_proj: tensor parallel size: got 4, need one of \[1, 2\]: in_features 128 .* group size 64"),
    ],
)
def test_numbers_of_ranks_that_do_not_divide_are_refused(num_ranks, allowed, message):
    part = Part("o_proj", LinearFormat(3, 64), 64)
    with pytest.raises(ValueError, match=message):
        FusedLinear(
            [part], in_features=K, held_in_features=K // num_ranks, rank=0, num_ranks=num_ranks, allowed=allowed
        )
