"""What the CUDA kernels do beside the low-bit product, on the emulator: rotations, salient channels, salient bases."""

from __future__ import annotations

import pytest
import torch
from cases import make_linear, make_x, random_rotation
from emulated import EmulatedLinear, Options
from tolerances import assert_as_good_as

from tests.emulator import driver

DTYPES = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "b"), [(160, 32), (384, 64), (384, 128)])
@pytest.mark.parametrize("m", [1, 9, 16, 17])
def test_a_shared_rotation(m: int, k: int, b: int, dtype: torch.dtype) -> None:
    """One that is not symmetric, before all kinds of products."""
    linear, x = make_linear(136, k, 3, 32, symmetric=False), make_x(m, k).to(dtype)
    linear.extras["rotation"] = random_rotation(1, b)
    for mode in ("plain", "checked"):
        y = EmulatedLinear(linear, mode).run(x, Options(seed=m), resident=3)
        assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("resident", [1, 64], ids=["8 warps", "16 warps"])
@pytest.mark.parametrize(("k", "r"), [(32, 1), (384, 160), (640, 8), (1024, 33), (2112, 65)])
@pytest.mark.parametrize("m", [1, 8])
def test_any_warp_of_the_kernel_for_a_few_tokens_may_take_salient_channels(
    m: int, k: int, r: int, resident: int
) -> None:
    """Warps take turns over the blocks of k, and whoever comes next takes the first salient ones."""
    linear, x = make_linear(64, k, 3, 32), make_x(m, k, "float16")
    linear.extras |= {
        "salient_weight": torch.randn(64, r).half(),
        "salient_index": torch.randperm(k)[:r].int(),
    }
    for mode in ("plain", "checked"):
        y = EmulatedLinear(linear, mode).run(x, Options(seed=k), resident=resident)
        assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("mode", ["plain", "checked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis_dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "r"), [(1, 1440, 2), (8, 416, 8), (5, 128, 1), (3, 2112, 3), (8, 256, 9)])
def test_few_tokens_with_a_basis_of_few_directions(
    m: int, k: int, r: int, basis_dtype: torch.dtype, dtype: torch.dtype, mode: str
) -> None:
    """The last has a direction too many, and goes the long way."""
    linear, x = make_linear(72, k, 3, 32, symmetric=False), make_x(m, k, str(dtype).removeprefix("torch."))
    linear.extras |= {
        "salient_weight": torch.randn(72, r).to(basis_dtype),
        "salient_basis": torch.linalg.qr(torch.randn(k, r)).Q.to(basis_dtype),
        "bias": torch.randn(72),
    }
    y = EmulatedLinear(linear, mode).run(x, Options(seed=1, completion="lazy"))
    assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "b", "r"), [(1, 160, 32, 2), (9, 384, 128, 8), (16, 1408, 64, 1), (16, 416, 0, 5)])
def test_blocks_project_their_own_slices(m: int, k: int, b: int, r: int, dtype: torch.dtype) -> None:
    """Parts of s from blocks that share a row tile, and from those that have two."""
    linear, x = make_linear(264, k, 3, 32, symmetric=False), make_x(m, k, str(dtype).removeprefix("torch."))
    linear.extras |= {
        "salient_weight": torch.randn(264, r).half(),
        "salient_basis": torch.linalg.qr(torch.randn(k, r)).Q.half(),
        "rotation": random_rotation(1, b) if b else None,
    }
    for mode, resident in (("plain", 1), ("checked", 2), ("plain", 12)):
        y = EmulatedLinear(linear, mode).run(x, Options(seed=m, completion="lazy"), resident=resident)
        assert_as_good_as(y, linear.plain(x), linear.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "shape", "kind", "r"),
    [
        (1, 72, 160, (1, 32), "basis", 2),
        (8, 264, 1408, (1, 128), "basis", 8),
        (3, 136, 2304, (36, 64), "basis", 5),
        (1, 264, 4224, (1, 128), "none", 0),
        (5, 136, 384, (4, 96), "index", 33),
        (2, 8, 96, (6, 16), "index", 1),
        (8, 72, 288, (1, 288), "none", 0),
    ],
)
def test_few_tokens_with_a_rotation(
    m: int, n: int, k: int, shape: tuple[int, int], kind: str, r: int, dtype: torch.dtype
) -> None:
    """Where all blocks of the kernel for a few tokens can be resident, and where they cannot; the last has a rotation
    that is no task for a warp."""
    linear, x = make_linear(n, k, 3, 32, symmetric=False), make_x(m, k, str(dtype).removeprefix("torch."))
    linear.extras["rotation"] = random_rotation(*shape).to(dtype if r % 2 else torch.float16)
    if kind != "none":
        linear.extras["salient_weight"] = torch.randn(n, r).half()
    if kind == "basis":
        linear.extras["salient_basis"] = torch.linalg.qr(torch.randn(k, r)).Q.to(dtype)
    elif kind == "index":
        linear.extras["salient_index"] = torch.randperm(k)[:r].int()
    for resident in (1, 12):
        plain, checked = EmulatedLinear(linear), EmulatedLinear(linear, "checked")
        first = plain.run(x, Options(seed=0, completion="eager"), resident=resident)
        assert_as_good_as(first, linear.plain(x), linear.expected(x))
        for emulated in (plain, checked):
            options = Options(seed=1, completion="lazy", shuffle_blocks=True)
            assert torch.equal(emulated.run(x, options, resident=resident, launches=2), first)


def test_an_index_that_does_not_exist_shows_as_nan() -> None:
    linear = make_linear(16, 64)
    linear.extras |= {"salient_weight": torch.randn(16, 2).half(), "salient_index": torch.tensor([3, 64]).int()}
    assert EmulatedLinear(linear, "checked").run(make_x(2, 64).half()).isnan().all()
