"""The ops against the float64 reference: values, exactness, repeatability, tracing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import Case, all_pairs, build, case_id, make_linear, make_x, pairs_of, pairwise_cases, random_rotation
from tolerances import assert_as_good_as, assert_int8_close, worst_column_error

import rosaq
from rosaq import _C, ops, reference

CASES = pairwise_cases()


def check_against_reference(case: Case) -> None:
    linear, x = build(case)
    want = linear.expected(x)
    assert_as_good_as(linear.run(x), linear.plain(x), want)


def test_cases_cover_every_pair() -> None:
    assert all_pairs() == set().union(*map(pairs_of, CASES))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_fused_gemm_is_as_good_as_pytorch(case: Case) -> None:
    check_against_reference(case)


@pytest.mark.parametrize("case", CASES[::4], ids=case_id)
def test_fused_gemm_on_every_isa(case: Case, isa: str) -> None:  # noqa: ARG001
    check_against_reference(case)


@pytest.mark.parametrize(("n", "k"), [(576, 576), (1536, 576), (576, 1536), (192, 4096)])
@pytest.mark.parametrize("m", [1, 100])
def test_fused_gemm_on_real_shapes(m: int, n: int, k: int) -> None:
    linear, x = make_linear(n, k, bits=3, group_size=64, symmetric=False), make_x(m, k)
    want = reference.fused_gemm(x, linear.qweight, linear.scales, linear.zeros, 3)
    assert_as_good_as(linear.run(x), linear.plain(x), want)


@pytest.mark.parametrize("rows_per_call", [1, 4, 13, 160])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_identity_gives_the_dequantised_weight_exactly(
    bits: int,
    symmetric: bool,
    rows_per_call: int,
    isa: str,  # noqa: ARG001
) -> None:
    linear = make_linear(40, 160, bits, 32, symmetric)
    rows = [linear.run(x) for x in torch.eye(160).split(rows_per_call)]
    assert torch.equal(torch.cat(rows).T, linear.dequantized())


def test_zeros_up_to_255_are_exact() -> None:
    linear = make_linear(16, 64, 4, 32, symmetric=False)
    linear.zeros = torch.randint(0, 256, (16, 2), dtype=torch.uint8)
    for x in (torch.eye(64), torch.eye(64)[:2]):
        assert torch.equal(linear.run(x).T, linear.dequantized()[:, : x.size(0)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 96, -1])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 4])
def test_unprepack_returns_the_same_bits(bits: int, scale_dtype: str, group_size: int, symmetric: bool) -> None:
    linear = make_linear(24, 192, bits, group_size, symmetric, scale_dtype)
    packed = linear.packed()
    qweight, scales, zeros = ops.unprepack(packed)
    assert torch.equal(qweight, linear.qweight)
    assert torch.equal(scales.view(torch.int16), linear.scales.view(torch.int16))
    assert scales.dtype == linear.scales.dtype
    assert (zeros is None) if symmetric else torch.equal(zeros, linear.zeros)
    assert packed.numel() == _C.packed_bytes(24, 192, bits, group_size, symmetric)


def test_prepack_takes_tensors_that_are_not_contiguous() -> None:
    linear = make_linear(16, 64, 3, 32, symmetric=False)
    strided = [t.T.contiguous().T for t in (linear.qweight, linear.scales, linear.zeros)]
    assert torch.equal(ops.prepack(*strided, 3), linear.packed())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for huge pages")
def test_a_large_blob_starts_on_a_huge_page_and_a_small_one_takes_no_room() -> None:
    large, small = make_linear(2048, 2048), make_linear(64, 2048)
    assert large.packed().data_ptr() % 2**21 == 0
    assert torch.equal(ops.unprepack(large.packed())[0], large.qweight)
    assert small.packed().untyped_storage().nbytes() == _C.packed_bytes(64, 2048, 4, 32, True)


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_weight_has_bits_per_weight_in_memory(bits: int) -> None:
    n, k, groups = 64, 1024, 8
    assert _C.packed_bytes(n, k, bits, 128, True) == _C.HEADER_BYTES + n * k * bits // 8 + n * groups * 2


@pytest.mark.parametrize("m", [1, 3, 12, 80])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_result_does_not_depend_on_the_number_of_threads(m: int, blocks: int, x_dtype: str) -> None:
    linear, x = make_linear(576, 384, 3, 64), make_x(m, 384, x_dtype)
    linear.extras |= {"salient_weight": torch.randn(576, 20).half(), "salient_basis": torch.randn(384, 20).half()}
    linear.extras["rotation"] = random_rotation(blocks, 128)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(linear.run(x))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
def test_a_token_does_not_depend_on_its_batch(x_dtype: str, isa: str) -> None:  # noqa: ARG001
    linear, few, many = make_linear(40, 384, 4, 128), make_x(2, 384, x_dtype), make_x(200, 384, x_dtype)
    assert torch.equal(linear.run(few), torch.cat([linear.run(row) for row in few.split(1)]))
    assert torch.equal(linear.run(many)[:100], linear.run(many[:100]))


@pytest.mark.parametrize(("m", "x_dtype"), [(2, "float32"), (2, "bfloat16"), (50, "bfloat16"), (400, "bfloat16")])
def test_integer_loops_give_the_same_bits_on_every_isa(m: int, x_dtype: str, restore_isa: None) -> None:  # noqa: ARG001
    linear, x, results = make_linear(40, 384, 3, 64, symmetric=False), make_x(m, 384, x_dtype), []
    for name in _C.available_isas()[1:]:  # portable has no integer path
        _C.set_isa(name)
        results.append(linear.run(x))
    assert results or _C.available_isas() == ["portable"]
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [2, 100])
def test_a_token_that_is_not_finite_gives_nothing_finite_and_spares_the_others(m: int, bad: float) -> None:
    linear, x = make_linear(16, 64, symmetric=False), torch.randn(m, 64)
    clean = linear.run(x)
    x[1, 5] = bad
    y = linear.run(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[0], clean[0])


@pytest.mark.parametrize("m", [2, 100])
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**110])
def test_huge_and_tiny_tokens_keep_their_precision(scale: float, m: int) -> None:
    linear, x = make_linear(16, 64), make_x(m, 64) * scale
    want = reference.fused_gemm(x, linear.qweight, linear.scales, None, 4)
    assert_as_good_as(linear.run(x), linear.plain(x), want)


def test_an_outlier_whose_weights_are_zero_does_not_drown_the_others() -> None:
    linear, x = make_linear(16, 128, 4, 128), torch.randn(2, 128)
    codes = ops.unpack(linear.qweight, 4)
    codes[:, 7] = 8
    linear.qweight = ops.pack(codes, 4)
    want = reference.fused_gemm(x, linear.qweight, linear.scales, None, 4)
    x[:, 7] = 100.0
    assert_as_good_as(linear.run(x), linear.plain(x), want)


def test_zero_tokens_and_zero_activations() -> None:
    linear = make_linear(16, 64, symmetric=False)
    assert linear.run(torch.empty(2, 0, 64)).shape == (2, 0, 16)
    assert torch.equal(linear.run(torch.zeros(3, 64)), torch.zeros(3, 16))
    assert linear.run(torch.randn(64)).shape == (16,)


def opcheck_args() -> dict[str, tuple[object, ...]]:
    linear = make_linear(24, 64, 3, 32, symmetric=False)
    optional = [torch.randn(24, 4).half(), None, torch.randn(64, 4).half(), random_rotation(2, 32), torch.randn(24)]
    return {
        "pack": (ops.unpack(linear.qweight, 3), 3),
        "unpack": (linear.qweight, 3),
        "prepack": (linear.qweight, linear.scales, linear.zeros, 3),
        "fused_gemm": (torch.randn(2, 3, 64), linear.packed(), *optional, 24, 3, 32, False),
        "fused_gemms": (
            torch.randn(2, 64),
            [linear.packed(), linear.packed()],
            [torch.randn(24, 4).half(), torch.randn(24, 4).half()],
            *optional[1:4],
            [],
            [24, 24],
            3,
            32,
            False,
        ),
    }


@pytest.mark.parametrize("op", ["pack", "unpack", "prepack", "fused_gemm", "fused_gemms"])
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.rosaq, op).default, opcheck_args()[op])


def test_compiles_as_one_graph_with_dynamic_batch() -> None:
    linear = make_linear(24, 64, 3, 32)
    packed = linear.packed()
    compiled = torch.compile(
        lambda x: linear.run(torch.relu(x), packed) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m in (1, 5, 33):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), linear.run(torch.relu(x), packed) * 2)


@pytest.fixture
def int8_precision() -> Iterator[None]:
    rosaq.set_cpu_precision("int8")
    yield
    rosaq.set_cpu_precision("exact")


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("x_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_activations_have_the_documented_error(
    m: int,
    x_dtype: str,
    symmetric: bool,
    isa: str,
    int8_precision: None,  # noqa: ARG001
) -> None:
    linear, x = make_linear(40, 1024, 4, 128, symmetric), torch.randn(m, 1024).to(getattr(torch, x_dtype))
    want = reference.fused_gemm(x, linear.qweight, linear.scales, linear.zeros, 4)
    y = linear.run(x)
    assert_int8_close(y, want)
    if isa != "portable" and x_dtype == "float32":  # it is another path, and it is deterministic for any batch
        assert worst_column_error(y, want) > 2.0**-12
        assert torch.equal(y, torch.cat([linear.run(row) for row in x.split(1)]))


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="set_cpu_precision: name: got 'int4', need exact or int8"):
        rosaq.set_cpu_precision("int4")
    assert _C.cpu_precision() == "exact"


@pytest.mark.parametrize("name", ["exact", "int8"])
def test_environment_variable_chooses_the_precision(name: str) -> None:
    code = "import torch; from rosaq import _C; print(_C.cpu_precision())"
    env = os.environ | {"ROSAQ_CPU_PRECISION": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


@pytest.mark.parametrize("isa", _C.available_isas()[1:])  # portable has no integer path
def test_many_bfloat16_tokens_give_the_bits_of_each_alone(isa: str, restore_isa: None) -> None:  # noqa: ARG001
    """Two units of tokens of different lengths, the last tile filled up, an odd number of panels, every feature."""
    _C.set_isa(isa)
    linear = make_linear(40, 384, 4, 32, symmetric=False)
    linear.extras |= {"salient_weight": torch.randn(40, 37).half(), "salient_basis": torch.randn(384, 37).half()}
    x = make_x(400, 384, "bfloat16")
    x[7], x[399, 3] = 0, float("nan")
    y = linear.run(x)
    for row in (0, 7, 203, 204, 207, 398):
        assert torch.equal(y[row : row + 1], linear.run(x[row : row + 1])), row
    assert y[:399].isfinite().all()
    assert y[399].isnan().all()


def test_many_bfloat16_tokens_with_extreme_zero_points_are_exact(isa: str) -> None:  # noqa: ARG001
    """2 code - 2 zero down to -255 times 15 bits of 128 channels: the largest sum that 32 bits must hold."""
    linear, x = make_linear(16, 128, 4, 128, symmetric=False), torch.zeros(64, 128, dtype=torch.bfloat16)
    linear.qweight.zero_()
    linear.zeros.fill_(255)
    linear.scales.fill_(0.5)
    x[:] = 127.5  # 127.5 * 256 is the largest integer of two digits that 8 bits of mantissa give
    assert torch.equal(linear.run(x), torch.full((64, 16), -127.5 * 0.5 * 127.5 * 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("r", "blocks", "b"), [(37, 3, 128), (2, 1, 32), (130, 1, 192)])
def test_16_bit_tokens_give_the_same_bits_in_any_batch(r: int, blocks: int, b: int, x_dtype: str) -> None:
    """Every tile size, with tokens that only fill a tile up, and every feature."""
    linear = make_linear(40, 384, 3, 64, symmetric=False)
    linear.extras |= {"salient_weight": torch.randn(40, r).half(), "salient_basis": torch.randn(384, r).half()}
    linear.extras["rotation"] = random_rotation(blocks, b)
    x = make_x(30, 384, x_dtype)
    alone = torch.cat([linear.run(row) for row in x.split(1)])
    for m in (2, 3, 4, 5, 7, 8, 9, 12, 13, 25, 30):
        assert torch.equal(linear.run(x[:m]), alone[:m]), m


def test_a_chunk_whose_largest_needs_a_shorter_fraction_is_exact() -> None:
    """255/128 with 16 bits would round up past the largest pair of digits."""
    linear, x = make_linear(16, 64, 4, 32, symmetric=False), torch.zeros(3, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 3], x[2, 3] = 255 / 128, -255 / 128, 254 / 128
    want = reference.fused_gemm(x, linear.qweight, linear.scales, linear.zeros, 4)
    assert torch.equal(linear.run(x), want.bfloat16())


@pytest.mark.parametrize("name", ["portable", _C.available_isas()[-1]])
def test_environment_variable_chooses_the_isa(name: str) -> None:
    code = "import torch; from rosaq import _C; print(_C.active_isa())"
    env = os.environ | {"ROSAQ_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name
