"""The CUDA kernels, executed by the emulator, against the float64 reference: values, exactness, repeatability."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cases import (
    CUDA_OPTIONS,
    Case,
    Linear,
    all_pairs,
    build,
    case_id,
    make_linear,
    make_x,
    pairs_of,
    pairwise_cases,
    random_rotation,
)
from emulated import EmulatedLinear, Options
from tolerances import assert_as_good_as

from rosaq import _C
from tests.emulator import driver

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
CASES = pairwise_cases(CUDA_OPTIONS)
DTYPES = [torch.float16, torch.bfloat16]


def test_cases_cover_every_pair() -> None:
    assert all_pairs(CUDA_OPTIONS) == set().union(*map(pairs_of, CASES)) & all_pairs(CUDA_OPTIONS)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_fused_gemm_is_as_good_as_pytorch_in_every_order(case: Case) -> None:
    """Three schedules of threads and copies give the same bits; another cut of the work gives others, as good."""
    linear, x = build(case)
    emulated, plain, expected = EmulatedLinear(linear), linear.plain(x), linear.expected(x)
    results = [
        emulated.run(x, Options(seed=seed, completion=completion, shuffle_blocks=seed == 2), resident=5)
        for seed, completion in enumerate(Options.COMPLETIONS)
    ]
    assert_as_good_as(results[0], plain, expected)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_as_good_as(emulated.run(x, Options(seed=3), resident=1), plain, expected)


@pytest.mark.parametrize("case", CASES[::2], ids=case_id)
def test_fused_gemm_has_no_race_and_stays_in_bounds(case: Case) -> None:
    linear, x = build(case)
    emulated = EmulatedLinear(linear, "checked")
    y = emulated.run(x, Options(seed=1, completion="lazy"), resident=5)
    assert_as_good_as(y, linear.plain(x), linear.expected(x))


WARPGROUP_CASES = [case for case in CASES if case["m"] > 16]


@pytest.mark.parametrize("case", WARPGROUP_CASES, ids=case_id)
def test_warpgroups_are_as_good_as_pytorch_in_every_order(case: Case) -> None:
    """As above, with the kernel that compute capability 9.0 has for them."""
    linear, x = build(case)
    emulated, plain, expected = EmulatedLinear(linear), linear.plain(x), linear.expected(x)
    results = [
        emulated.run(x, Options(seed=seed, completion=completion), resident=5, compute_major=9)
        for seed, completion in enumerate(Options.COMPLETIONS)
    ]
    assert_as_good_as(results[0], plain, expected)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_as_good_as(emulated.run(x, Options(seed=3), resident=1, compute_major=9), plain, expected)


@pytest.mark.parametrize("case", WARPGROUP_CASES[::2], ids=case_id)
def test_warpgroups_have_no_race_and_stay_in_bounds(case: Case) -> None:
    linear, x = build(case)
    y = EmulatedLinear(linear, "checked").run(x, Options(seed=1, completion="lazy"), resident=5, compute_major=9)
    assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("rows_per_call", "compute_major"), [(3, 8), (16, 8), (60, 8), (20, 9), (60, 9)])
def test_identity_gives_the_dequantised_weight_exactly(
    rows_per_call: int, compute_major: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    linear = make_linear(40, 160, bits, 32, symmetric)
    emulated = EmulatedLinear(linear)
    rows = [emulated.run(x, compute_major=compute_major) for x in torch.eye(160, dtype=dtype).split(rows_per_call)]
    assert torch.equal(torch.cat(rows).T, linear.dequantized().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("k", [32, 160, 256, 1440])
@pytest.mark.parametrize("n", [8, 136])
def test_sizes_that_end_in_the_middle_of_a_block(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    linear, x = make_linear(n, k, 3, group_size, symmetric=False), make_x(3, k).to(dtype)
    assert_as_good_as(EmulatedLinear(linear).run(x, resident=7), linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_up_to_255_are_exact(dtype: torch.dtype) -> None:
    linear = make_linear(16, 64, 4, 32, symmetric=False)
    linear.zeros = torch.randint(0, 256, (16, 2), dtype=torch.uint8)
    emulated = EmulatedLinear(linear)
    for x in (torch.eye(64, dtype=dtype)[:5], torch.eye(64, dtype=dtype)):
        assert torch.equal(emulated.run(x).T, linear.dequantized().to(dtype)[:, : len(x)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 4])
def test_blob_returns_the_same_bits(bits: int, scale_dtype: str, group_size: int, symmetric: bool) -> None:
    linear = make_linear(136, 192, bits, group_size, symmetric, scale_dtype)
    emulated = EmulatedLinear(linear, "checked")
    qweight, scales, zeros = emulated.unprepack()
    assert torch.equal(qweight, linear.qweight)
    assert torch.equal(scales.view(torch.int16), linear.scales.view(torch.int16))
    assert (zeros is None) if linear.zeros is None else torch.equal(zeros, linear.zeros)
    for dtype in DTYPES:
        assert torch.equal(emulated.dequantize(dtype), linear.dequantized().to(dtype))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_pack_as_on_the_cpu(bits: int) -> None:
    linear = make_linear(24, 96, bits)
    emulated, codes = EmulatedLinear(linear), torch.ops.rosaq.unpack(linear.qweight, bits)
    with emulated.library.buffers() as buffers:
        for packs in (True, False):
            words, source = buffers.output("qweight", linear.qweight), buffers.output("codes", codes)
            if packs:
                source = buffers.input("codes", codes)
            else:
                words = buffers.input("qweight", linear.qweight)
            emulated.library.call("fused_codes", Options(), source, words, linear.qweight.numel() // bits, bits, packs)
            assert torch.equal(buffers.read(words), linear.qweight)
            assert torch.equal(buffers.read(source), codes)


def with_everything(n: int = 264, k: int = 384, r: int = 33) -> Linear:
    linear = make_linear(n, k, 3, 64, symmetric=False)
    linear.extras |= {
        "salient_weight": (torch.randn(n, r) / k**0.5).half(),
        "salient_basis": torch.linalg.qr(torch.randn(k, r)).Q.half(),
        "rotation": random_rotation(3, 128),
        "bias": torch.randn(n).half(),
    }
    return linear


def test_launches_leave_the_counters_as_they_found_them() -> None:
    """The same call again and again, and calls with other grids on the same counters."""
    linear, x = with_everything(), make_x(9, 384).half()
    emulated = EmulatedLinear(linear, "checked")
    first = emulated.run(x, resident=5)
    assert torch.equal(emulated.run(x, Options(seed=9), resident=5, launches=3), first)


def test_more_than_64_tokens_are_as_many_launches() -> None:
    linear, x = with_everything(), make_x(70, 384).half()
    emulated = EmulatedLinear(linear)
    y = emulated.run(x, resident=4)
    assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weight_and_rows_for_many_tokens(dtype: torch.dtype) -> None:
    linear, x = make_linear(136, 96), make_x(5, 96).to(dtype)
    linear.extras |= {
        "salient_weight": torch.randn(136, 3).half(),
        "salient_index": torch.tensor([5, 0, 95]).int(),
        "bias": torch.randn(136),
    }
    emulated, other = EmulatedLinear(linear, "checked"), torch.randn(5, 136).to(dtype)
    weight, y = linear.dequantized().to(dtype), torch.randn(5, 136).to(dtype)
    with emulated.library.buffers() as buffers:
        args = emulated.args(x, buffers)
        dense = buffers.inout("weight", weight)
        emulated.library.call("fused_add_salient", Options(), ctypes.byref(args), dense)
        sums = weight.float().index_add(1, torch.tensor([5, 0, 95]), linear.extras["salient_weight"].float())
        assert torch.equal(buffers.read(dense), sums.to(dtype))
        args.y = buffers.inout("y", y)
        emulated.library.call("fused_add_rows", Options(), ctypes.byref(args), buffers.input("other", other))
        assert torch.equal(buffers.read(args.y), (y.float() + linear.extras["bias"] + other.float()).to(dtype))


@pytest.mark.parametrize("index", [[5, 96], [0, 96], [96, 0], [-1, 96, 96, 7], [0, -1, 0]])
def test_a_column_that_does_not_exist_shows_in_the_dense_weight_too(index: list[int]) -> None:
    """Whoever has column 0: the checker sees no race between threads."""
    linear = make_linear(40, 96)
    linear.extras |= {"salient_weight": torch.randn(40, len(index)).half(), "salient_index": torch.tensor(index).int()}
    emulated, x = EmulatedLinear(linear, "checked"), make_x(2, 96).half()
    with emulated.library.buffers() as buffers:
        args, dense = emulated.args(x, buffers), buffers.inout("weight", linear.dequantized().half())
        for seed in range(4):
            emulated.library.call("fused_add_salient", Options(seed=seed), ctypes.byref(args), dense)
        weight = buffers.read(dense)
    assert weight[:, 0].isnan().all()
    assert weight[:, 1:].isfinite().all()


def test_the_checker_would_see_a_blob_that_is_too_short() -> None:
    emulated = EmulatedLinear(make_linear(16, 64), "checked")
    emulated.blob = emulated.blob[: _C.packed_bytes(16, 64, 4, 32, True, cuda=True) // 2].clone()
    with pytest.raises(driver.KernelError, match="out of bounds|not within"):
        emulated.run(make_x(2, 64).half())


def test_layout_of_a_record_is_what_the_extension_says() -> None:
    """Codes that differ in one bit differ in the bit of the blob that `_C.cuda_code_bits` names."""
    for bits in (3, 4):
        linear = make_linear(32, 128, bits)
        base = EmulatedLinear(linear).blob
        for row, k in [(0, 0), (5, 31), (17, 77), (31, 127)]:
            codes = torch.ops.rosaq.unpack(linear.qweight, bits)
            for b, (lane, word, bit) in enumerate(_C.cuda_code_bits(bits, row, k)):
                changed = codes.clone()
                changed[row, k] ^= 1 << b
                other = EmulatedLinear(replace(linear, qweight=torch.ops.rosaq.pack(changed, bits))).blob
                at = 128 + (word // 4 * 32 + lane) * 16 + word % 4 * 4 + bit // 8
                assert (base ^ other).nonzero().flatten().tolist() == [at]
                assert int(base[at] ^ other[at]) == 1 << bit % 8
