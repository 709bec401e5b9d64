"""Grids, round to nearest and GPTQ: values, the properties theory promises, and refusals."""

import itertools
from dataclasses import replace

import pytest
import torch

from rosaq.layout import dequantize, unpack, zero_points
from rosaq.quantizers import (
    NotPositiveDefiniteError,
    energy_index,
    fit_grid,
    gptq,
    quantize_weight,
    quantize_with_basis,
)
from rosaq.quantizers.grid import Grid, from_codes, to_codes
from rosaq.quantizers.refine import refine, refit_scales, sweep_codes
from rosaq.quantizers.salient import salient_mask
from rosaq.specs import QuantSpec
from tests.peak import PeakMemory
from tests.tolerances import assert_close_in

K, N = 128, 24


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(k=K, seed=0):
    x = gaussian(4 * k, k, seed=seed).double()
    mix = gaussian(k, k, seed=seed + 1).double() / k**0.5 + torch.eye(k)
    x = (x * torch.linspace(2, 0.2, k)) @ mix
    return x.T @ x / len(x)


def w_hat(tensors, spec):
    w = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), spec.bits)
    if "salient_index" in tensors:
        w[:, tensors["salient_index"].long()] += tensors["salient_weight"].float()
    return w


def loss(w, w_quantized, gram):
    d = (w_quantized - w).double()
    return float(((d @ gram) * d).sum())


SPECS = [
    QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, method=method, clip=clip)
    for bits in (3, 4)
    for group_size in (32, 64, -1)
    for symmetric in (False, True)
    for method, clip in (("rtn", False), ("gptq", True))
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_stored_tensors_have_the_disk_shapes_and_bound_the_error(spec):
    w, salient = gaussian(N, K), torch.tensor([3, 40, 41])
    tensors = quantize_weight(w, correlated_gram(), spec, salient)
    groups = 1 if spec.group_size == -1 else K // spec.group_size
    assert tensors["qweight"].shape == (N, K * spec.bits // 32)
    assert tensors["qweight"].dtype == torch.int32
    assert tensors["scales"].shape == (N, groups)
    assert tensors["scales"].dtype == torch.float16
    assert ("zeros" in tensors) == (not spec.symmetric)
    assert tensors["salient_index"].tolist() == [3, 40, 41]
    codes = unpack(tensors["qweight"], spec.bits)
    assert int(codes.max()) < 2**spec.bits
    bulk = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), spec.bits)
    assert torch.equal(bulk[:, salient], torch.zeros(N, 3))  # salient columns dequantise to exactly 0
    if spec.method == "rtn" and not spec.clip:
        step = tensors["scales"].float().abs().repeat_interleave(K // groups, 1)
        error = (w_hat(tensors, spec) - w).abs()
        error[:, salient] = 0
        assert bool((error <= 0.51 * step + 1e-3).all())


def test_a_weight_on_the_grid_comes_back_exactly():
    scale, zero = torch.full((N, 2), 0.25), torch.full((N, 2), 3.0)
    codes = torch.randint(0, 8, (N, 2, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = 0, 7  # the whole range is used, so min and max find this grid
    w = from_codes(codes, Grid(scale[..., None], zero[..., None])).flatten(1)
    spec = QuantSpec(bits=3, group_size=64, method="rtn", clip=False)
    tensors = quantize_weight(w, None, spec)
    assert torch.equal(w_hat(tensors, spec), w)
    assert torch.equal(unpack(tensors["qweight"], 3), codes.flatten(1).to(torch.uint8))


def test_the_clip_search_never_loses_to_min_max():
    w = gaussian(N, 2, 64) ** 3  # heavy tails, where clipping pays
    importance = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) + 0.1

    def error(clip, weights):
        grid = fit_grid(w, QuantSpec(clip=clip), importance if weights else None)
        wide = Grid(grid.scale[..., None], grid.zero[..., None])
        square = (from_codes(to_codes(w, wide, 3), wide) - w) ** 2
        return (square * importance if weights else square).sum(-1)

    for weights in (False, True):
        assert bool((error(True, weights) <= error(False, weights)).all())
        assert error(True, weights).sum() < error(False, weights).sum()


@pytest.mark.parametrize("clip", [False, True])
def test_the_sign_of_a_symmetric_scale_puts_the_extra_level_on_the_long_side(clip):
    w = gaussian(N, 2, 64).abs() * torch.tensor([1.0, -1.0])[:, None]  # one group above zero, one below
    w[..., 0] = -w[..., 1] / 10
    grid = fit_grid(w, QuantSpec(symmetric=True, clip=clip))
    assert bool((grid.scale[:, 0] < 0).all())
    assert bool((grid.scale[:, 1] > 0).all())
    assert bool((grid.zero == 4).all())
    mirrored = fit_grid(-w, QuantSpec(symmetric=True, clip=clip))
    assert torch.equal(mirrored.scale, -grid.scale)
    if not clip:  # four levels on the long side reach its end
        assert_close_in(grid.scale.abs() * 4, w.abs().amax(-1), torch.float16)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("salient", [None, torch.tensor([0, 1, 70])])
def test_gptq_is_rtn_on_a_diagonal_gram(symmetric, salient):
    w = gaussian(N, K)
    gram = torch.diag(torch.linspace(0.1, 9, K, dtype=torch.float64))
    tensors = {
        method: quantize_weight(
            w, gram, QuantSpec(group_size=32, symmetric=symmetric, method=method, clip=False), salient
        )
        for method in ("rtn", "gptq")
    }
    assert tensors["rtn"].keys() == tensors["gptq"].keys()
    for name, tensor in tensors["rtn"].items():
        assert torch.equal(tensor, tensors["gptq"][name]), name


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gptq_beats_rtn_on_a_correlated_gram(group_size):
    w, gram = gaussian(N, K), correlated_gram()
    losses = {}
    for method in ("rtn", "gptq"):
        spec = QuantSpec(group_size=group_size, method=method, clip=False)
        losses[method] = loss(w, w_hat(quantize_weight(w, gram, spec), spec), gram)
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_panels_do_not_change_gptq():
    """One long group is cut into panels; the textbook column loop has none."""
    k = 320
    w, gram = gaussian(6, k), correlated_gram(k)
    spec = QuantSpec(group_size=-1, clip=False)
    salient = salient_mask(k, torch.tensor([5, 200]))
    codes, grid, corrected = gptq(w, gram, spec, k, salient)

    bulk = torch.nonzero(~salient).flatten()
    bulk = bulk[torch.diagonal(gram)[bulk].argsort(descending=True)]
    order = torch.cat([bulk, torch.nonzero(salient).flatten()])
    g = gram[order][:, order]
    torch.diagonal(g).add_(spec.damping * torch.diagonal(g)[: k - 2].mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(g), upper=True).float()
    work, want = w[:, order].clone(), torch.empty(6, k - 2)
    for j in range(k - 2):
        want[:, j] = to_codes(work[:, j], Grid(grid.scale[:, 0], grid.zero[:, 0]), 3)
        error = (work[:, j] - from_codes(want[:, j], Grid(grid.scale[:, 0], grid.zero[:, 0]))) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    differing = (codes[:, order[: k - 2]] != want).float().mean()
    assert differing < 0.01  # float32 sums in another order may flip a code that sits on a boundary
    if differing == 0:
        torch.testing.assert_close(corrected, work[:, k - 2 :], rtol=1e-3, atol=1e-3)


def test_gptq_does_not_care_how_channels_are_numbered():
    """Energy alone decides what is rounded first: groups and the channels in them may come in any order."""
    w, gram, spec = gaussian(N, K), correlated_gram(), QuantSpec(group_size=32)
    generator = torch.Generator().manual_seed(2)
    groups = torch.randperm(K // 32, generator=generator)
    order = torch.cat([32 * group + torch.randperm(32, generator=generator) for group in groups])
    salient = salient_mask(K, torch.tensor([3, 77]))
    codes, grid, corrected = gptq(w, gram, spec, 32, salient)
    renumbered = gptq(w[:, order], gram[order][:, order], spec, 32, salient[order])
    assert (renumbered[0] != codes[:, order]).float().mean() < 0.01  # sums of another order may flip a few
    assert ((renumbered[1].scale - grid.scale[:, groups]).abs() > 1e-3).float().mean() < 0.02
    kept = order[torch.nonzero(salient[order]).flatten()]
    torch.testing.assert_close(renumbered[2][:, kept.argsort()], corrected, rtol=0.02, atol=0.02)


def test_groups_of_equal_energy_stay_whole():
    """Inputs that are there twice, as in widened models: columns of two groups must not be rounded in turns."""
    w, half = gaussian(N, K), correlated_gram(K // 2)
    spec, none = QuantSpec(group_size=32), salient_mask(K, torch.tensor([], dtype=torch.int64))
    losses = []
    for gap in (0.0, 1e-9):
        twice = torch.diag(torch.cat([torch.diagonal(half), torch.diagonal(half) * (1 + gap)]))
        codes, grid, _ = gptq(w, twice, spec, 32, none)
        wide = Grid(grid.scale.repeat_interleave(32, 1), grid.zero.repeat_interleave(32, 1))
        losses.append(float((from_codes(codes, wide) - w).double().square().matmul(torch.diagonal(twice)).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("group_size", [32, 128])
def test_rows_are_refitted_alike_however_many_at_once(group_size):
    n, k = 6, 512
    w, gram, salient = gaussian(n, k), correlated_gram(k), salient_mask(k, torch.tensor([1, 300]))
    codes, grid, kept = gptq(w, gram, QuantSpec(group_size=group_size), group_size, salient)
    target = w.double() @ gram
    whole, weights = refit_scales(target, gram, codes, grid, kept, salient)
    for row in range(n):
        one = slice(row, row + 1)
        own = Grid(grid.scale[one], grid.zero[one])
        alone, weight = refit_scales(target[one], gram, codes[one], own, kept[one], salient)
        torch.testing.assert_close(alone.scale, whole.scale[one], rtol=1e-3, atol=0)
        torch.testing.assert_close(weight, weights[one], rtol=1e-3, atol=1e-4)


def test_refitting_many_groups_holds_no_more_than_few():
    """The problem of a row has as many unknowns as groups, and that squared numbers."""
    n, k, peaks = 512, 1024, []
    gram, salient = correlated_gram(k), salient_mask(k, torch.tensor([5]))
    codes, target, kept = torch.randint(0, 8, (n, k)).float(), torch.randn(n, k, dtype=torch.float64), gaussian(n, 1)
    for groups in (1, k // 32):
        with PeakMemory() as memory:
            grid = Grid(torch.full((n, groups), 0.01), torch.full((n, groups), 4.0))
            refit_scales(target, gram, codes, grid, kept, salient)
        peaks.append(memory.peak)
    assert peaks[1] <= 1.1 * peaks[0]


def test_salient_columns_receive_the_least_squares_correction():
    """With the bulk fixed, no other salient weights have a smaller loss: the normal equations hold."""
    w, gram = gaussian(N, K), correlated_gram()
    salient = salient_mask(K, torch.tensor([2, 64, 65, 127]))
    codes, grid, corrected = gptq(w, gram, QuantSpec(damping=1e-8), 64, salient)
    wide = Grid(grid.scale[..., None], grid.zero[..., None])
    quantized = from_codes(codes.unflatten(1, (-1, 64)), wide).flatten(1)
    assert torch.equal(quantized[:, salient], torch.zeros(N, 4))
    with_correction = quantized.clone()
    with_correction[:, salient] = corrected
    residual = (with_correction - w).double() @ gram
    assert residual[:, salient].abs().max() < 1e-4 * residual.abs().max()
    quantized[:, salient] = w[:, salient]
    assert loss(w, with_correction, gram) < loss(w, quantized, gram)


@pytest.mark.parametrize(("method", "rounds"), [("rtn", 0), ("gptq", 0), ("gptq", 2)])
def test_zero_points_between_two_codes_gain_at_3_bits_and_leave_salient_columns_whole(method, rounds):
    """Gaussian rows: eight levels evenly around zero lose less than three below it and four above. Salient columns,
    whose codes then are half a step off, still stand for the same weights."""
    w, salient = gaussian(256, 4 * K), torch.tensor([2, 64])
    gram = correlated_gram(4 * K) + torch.eye(4 * K)
    losses = []
    for half_zeros in (False, True):
        spec = QuantSpec(3, -1, method=method, damping=1e-8, half_zeros=half_zeros, refine=rounds)
        tensors = quantize_weight(w, gram, spec, salient)
        is_half = zero_points(tensors["zeros"]) % 1 == 0.5
        assert bool(is_half.any()) == half_zeros
        stored = w_hat(tensors, spec)
        losses.append(loss(w, stored, gram))
        if method == "rtn":
            assert_close_in(stored[:, salient].flatten(), w[:, salient].flatten(), torch.float16)
        else:
            residual = (stored - w).double() @ gram
            assert residual[:, salient].abs().max() < 1e-2 * residual.abs().max()
    assert losses[1] < 0.98 * losses[0]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_basis_is_exact_on_the_directions_with_most_energy(method):
    w, gram = gaussian(N, K), correlated_gram()
    sink = torch.nn.functional.normalize(gaussian(K, seed=5).double(), dim=0)
    gram = gram + 1e3 * torch.outer(sink, sink)
    spec = QuantSpec(group_size=32, method=method, clip=False)
    tensors = quantize_with_basis(w, gram, spec, 2)
    assert tensors["salient_basis"].shape == (K, 2)
    assert tensors["salient_weight"].shape == (N, 2)
    basis = tensors["salient_basis"].double()
    assert (basis[:, 0] @ sink).abs() > 0.999
    bulk = w_hat(tensors, spec).double()
    whole = bulk + tensors["salient_weight"].double() @ basis.T
    assert_close_in(whole @ basis[:, :1], w.double() @ basis[:, :1], torch.float16)
    assert loss(w, whole, gram) < 0.5 * loss(w, bulk, gram)
    if method == "gptq":  # codes chosen with the direction taken care of lose less than codes that had to care for it
        plain = dequantize(*(quantize_weight(w, gram, spec)[key] for key in ("qweight", "scales", "zeros")), 3)
        cross = gram @ basis
        patched = plain.double() + (w - plain).double() @ cross @ torch.linalg.inv(basis.T @ cross) @ basis.T
        assert loss(w, whole, gram) < loss(w, patched, gram)


def test_rows_are_independent():
    w, gram, spec = gaussian(N, K), correlated_gram(), QuantSpec(group_size=32)
    stacked = quantize_weight(w, gram, spec)
    alone = quantize_weight(w[8:16], gram, spec)
    same = (stacked["qweight"][8:16] == alone["qweight"]).float().mean()
    assert same > 0.98


def test_energy_index_is_sorted_and_by_second_moment():
    gram = torch.diag(torch.tensor([1.0, 9, 2, 8, 3, 7, 0, 0], dtype=torch.float64))
    assert energy_index(gram, 2).tolist() == [1, 3]
    with pytest.raises(ValueError, match="salient: got 3, need 0 to in_features / 4 = 2"):
        energy_index(gram, 3)


def test_damping_is_measured_on_the_bulk_and_rises_when_it_must():
    gram = torch.zeros(K, K, dtype=torch.float64)
    gram[:8, :8] = torch.eye(8)  # rank 8: not invertible without damping
    tensors = quantize_weight(gaussian(N, K), gram, QuantSpec(damping=1e-7))
    assert torch.isfinite(tensors["scales"].float()).all()
    indefinite = gram - 100 * torch.eye(K) + 101 * torch.ones(K, K)
    with (
        pytest.warns(RuntimeWarning, match="damping doubled to") as warned,
        pytest.raises(NotPositiveDefiniteError, match=r"not positive definite with damping up to 0\.64"),
    ):
        quantize_weight(gaussian(N, K), indefinite, QuantSpec())
    assert len(warned) == 6
    slightly = torch.eye(K, dtype=torch.float64)
    slightly[0, 1] = slightly[1, 0] = 1.03
    with pytest.warns(RuntimeWarning, match=r"damping doubled to 0\.04"):  # and no further
        assert torch.isfinite(quantize_weight(gaussian(N, K), slightly, QuantSpec())["scales"].float()).all()


@pytest.mark.parametrize("num_dead", [1, K])
def test_dead_channels_need_no_damping_of_their_own(num_dead):
    w, gram = gaussian(N, K), correlated_gram()
    gram[:num_dead] = gram[:, :num_dead] = 0
    spec = QuantSpec(group_size=32, damping=0.0, refine=2)
    refined, once = (w_hat(quantize_weight(w, gram, s), s) for s in (spec, replace(spec, refine=0)))
    assert loss(w, refined, gram) <= loss(w, once, gram)
    assert (refined - w)[:, :num_dead].square().mean() < 0.1  # whatever they hold, it is rounded to nearest


def test_refusals_name_the_argument():
    w, gram = gaussian(N, K), correlated_gram()
    with pytest.raises(ValueError, match="gram: got None"):
        quantize_weight(w, None, QuantSpec(method="gptq"))
    with pytest.raises(ValueError, match=r"gram: got shape \(64, 64\), need \(128, 128\)"):
        quantize_weight(w, gram[:64, :64], QuantSpec())
    bad, holed = gram.clone(), w.clone()
    bad[0, 0], holed[1, 1] = torch.inf, torch.nan
    with pytest.raises(ValueError, match="gram: got 1 NaN or Inf"):
        quantize_weight(w, bad, QuantSpec())
    with pytest.raises(ValueError, match="got 1 NaN or Inf, need finite"):
        quantize_weight(holed, gram, QuantSpec())
    with pytest.raises(ValueError, match="group_size: got 96, need a divisor of in_features 128"):
        quantize_weight(w, gram, QuantSpec(group_size=96))
    with pytest.raises(ValueError, match="salient: got 33, need at most in_features / 4 = 32"):
        quantize_weight(w, gram, QuantSpec(), torch.arange(33))
    with pytest.raises(ValueError, match="bits: got 5"):
        QuantSpec(bits=5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_step_of_refine_lowers_the_loss(symmetric):
    w, gram = gaussian(N, K), correlated_gram()
    salient = salient_mask(K, torch.tensor([2, 64, 127]))
    codes, grid, kept = gptq(w, gram, QuantSpec(symmetric=symmetric), 32, salient)

    def total(codes, grid, kept):
        w_hat = from_codes(codes.unflatten(1, (-1, 32)), Grid(grid.scale[..., None], grid.zero[..., None])).flatten(1)
        w_hat[:, salient] = kept
        return loss(w, w_hat, gram)

    losses = [total(codes, grid, kept)]
    for _ in range(3):
        grid, kept = refit_scales(w.double() @ gram, gram, codes, grid, kept, salient)
        losses.append(total(codes, grid, kept))
        codes = sweep_codes(w, gram, codes, grid, kept, salient, 3)
        losses.append(total(codes, grid, kept))
    # the refit is optimal before scales and salient weights are rounded to float16
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]
    assert codes.min() >= 0
    assert codes.max() <= 7
    assert torch.equal(grid.scale, grid.scale.half().float())


def test_refitted_scales_solve_the_normal_equations():
    """One row, dense algebra: the least-squares solution over groups and salient columns."""
    w, gram = gaussian(1, 64), correlated_gram(64)
    salient = salient_mask(64, torch.tensor([5]))
    codes, grid, kept = gptq(w, gram, QuantSpec(group_size=32), 32, salient)
    steps = (codes - grid.zero.repeat_interleave(32, 1))[0].double()
    basis = torch.zeros(64, 3, dtype=torch.float64)
    basis[:32, 0], basis[32:, 1], basis[5, 2] = steps[:32], steps[32:], 1
    basis[5, 0] = 0
    want = torch.linalg.solve(basis.T @ gram @ basis, basis.T @ gram @ w[0].double())
    fitted, corrected = refit_scales(w.double() @ gram, gram, codes, grid, kept, salient)
    assert_close_in(torch.cat([fitted.scale, corrected], 1)[0], want, torch.float16)


def test_refine_leaves_an_exact_quantisation_alone():
    scale, zero = torch.full((N, 4), 0.5), torch.full((N, 4), 3.0)
    codes = torch.randint(0, 8, (N, K), generator=torch.Generator().manual_seed(0)).float()
    w = from_codes(codes.unflatten(1, (4, -1)), Grid(scale[..., None], zero[..., None])).flatten(1)
    nothing = salient_mask(K, None)
    got = refine(w, correlated_gram(), codes, Grid(scale, zero), torch.empty(N, 0), nothing, 3, 2)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1].scale, scale)
