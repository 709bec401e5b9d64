"""Rotations fitted to the weights: they stay rotations, find the bases that are there to be found, and rounding in them
leaves less."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rosaq.pipeline.fitting as fitting
from rosaq.checkpoint import WeightReader
from rosaq.layout import dequantize
from rosaq.pipeline import quantize, run
from rosaq.quantizers import quantize_weight
from rosaq.recipes import make_recipe
from rosaq.rotation import StreamWeight, even_scales, fit_basis, fit_heads, random_orthogonal, start_basis
from rosaq.specs import CalibrationSpec, QuantSpec, RotationSpec, SalientSpec
from tests.models import save_dense, tiny_llama
from tests.tolerances import assert_tight

TEXT = [Path(__file__).read_text(encoding="utf-8")]
SMALL = {
    "group_size": 32,
    "calibration": TEXT,
    "spec": CalibrationSpec(num_sequences=4, sequence_length=32, batch_size=2),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def root_of_sixth_moments(rows):
    """Mean over the rows [n, m]: 1 for entries of one magnitude, the root of 15 for Gaussian ones."""
    squares = rows.double().square()
    return float((squares.pow(3).mean(1) / squares.mean(1).pow(3)).sqrt().mean())


def corners(n, d, turn):
    """Rows whose entries have one magnitude in one basis, and in no other: x · turn is read."""
    return (torch.randint(0, 2, (n, d), generator=generator(1)).double() * 2 - 1) @ turn.T


@pytest.mark.parametrize("writes", [False, True])
def test_a_basis_in_which_all_entries_are_alike_is_found(writes):
    hidden = random_orthogonal(24, generator(2)).double()
    rows = corners(900, 24, hidden)
    weight = StreamWeight(rows.float(), 1.0)
    if writes:  # rows of what is written are its rows in the basis of the stream
        rows = hidden @ corners(900, 24, eye(24)).T.sign() * 1.0
        weight = StreamWeight(rows.float(), 1.0, writes=True)
    start = random_orthogonal(24, generator(3))
    found = fit_basis(start, [[weight]] * 400, 400)
    assert_tight(found.T @ found, eye(24))
    seen = (lambda basis: basis.T @ rows) if writes else (lambda basis: rows @ basis)
    assert root_of_sixth_moments(seen(start)) > 3
    assert root_of_sixth_moments(seen(found)) < 1.3


def test_columns_of_unequal_energy_are_found_and_the_span_is_kept():
    """20 of 32 directions are turned: what they span stays, and the energies are the planted ones."""
    basis = random_orthogonal(32, generator(4)).double()
    apart, span = basis[:, :12], basis[:, 12:]
    planted = span @ random_orthogonal(20, generator(5))
    deviations = torch.logspace(-1, 1, 20, dtype=torch.float64)
    rows = torch.randn(3000, 20, generator=generator(6), dtype=torch.float64) * deviations @ planted.T
    found = fit_basis(span, [[StreamWeight(rows.float(), 1.0)]] * 500, 500)
    assert_tight(found.T @ found, eye(20))
    assert (apart.T @ found).abs().max() < 1e-12
    energy = lambda turn: (rows @ turn).square().mean(0).log().mean()  # noqa: E731 - of the basis, three times
    assert energy(span) - energy(planted) > 1
    assert energy(found) - energy(planted) < 0.1


def test_the_start_is_a_basis_of_the_span_with_unequal_energies():
    rows = torch.randn(800, 150, generator=generator(7), dtype=torch.float64)
    rows *= torch.logspace(-1, 1, 150, dtype=torch.float64)
    span = random_orthogonal(150, generator(8)).double()[:, 10:]
    start = start_basis(rows.T @ rows, span, generator(9))
    assert_tight(start.T @ start, eye(140))
    assert_tight(start @ start.T, span @ span.T)
    level = lambda turn: float((rows @ turn).square().mean(0).log().mean())  # noqa: E731
    assert level(start) < level(span) - 1


def test_rows_count_by_their_share():
    """Two weights that want different bases: the one that is said to lose more gets its own."""
    turns = [random_orthogonal(16, generator(seed)).double() for seed in (10, 11)]
    rows = [corners(500, 16, turn).float() for turn in turns]
    for favoured in (0, 1):
        batch = [StreamWeight(rows[i], 1.0 if i == favoured else 0.02) for i in (0, 1)]
        found = fit_basis(start_basis(eye(16), eye(16), generator(12)), [batch] * 400, 400)
        tails = [root_of_sixth_moments(r.double() @ found) for r in rows]
        assert tails[favoured] < 1.5 < 2 < tails[1 - favoured]


def test_heads_get_equal_energy_in_every_channel_and_lighter_tails():
    heads, group, d = 2, 3, 16
    turns = torch.stack([random_orthogonal(d, generator(seed)) for seed in (13, 14)]).double()
    rows = torch.randint(0, 2, (400, heads, group, d), generator=generator(15)).double() * 2 - 1
    rows = torch.einsum("nhgd,hed->nhge", rows * torch.logspace(-0.5, 0.5, d, dtype=torch.float64), turns)
    start = torch.stack([random_orthogonal(d, generator(seed)) for seed in (16, 17)])
    found = fit_heads(rows, start)
    assert found.shape == (heads, d, d)
    assert found.dtype == torch.float64
    back = torch.linalg.inv(found).transpose(1, 2)
    turned = torch.einsum("nhgd,hde->nhge", rows, back)
    energy = turned.square().sum((0, 2)).flatten()
    assert_tight(energy / energy.mean(), torch.ones(heads * d, dtype=torch.float64))
    lighter, before = (
        root_of_sixth_moments(x.flatten(1)) for x in (turned, torch.einsum("nhgd,hde->nhge", rows, start))
    )
    assert lighter < before - 1
    product = torch.einsum("hde,hfe->hdf", found, back)
    assert_tight(product, eye(d).expand(heads, d, d))


def test_even_scales_make_columns_alike_and_take_no_column_for_nothing():
    energy = torch.tensor([4.0, 1.0, 0.25, 9.0], dtype=torch.float64)
    scales = even_scales(energy)
    assert_tight(energy / scales.square(), (energy / scales.square())[:1].expand(4))
    assert_tight(scales.log().sum().exp(), torch.ones((), dtype=torch.float64))
    dead = even_scales(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.isfinite(dead).all()
    assert dead.min() > 1e-3


def test_gptq_leaves_less_in_a_fitted_basis():
    """What it is for: 3 bits, one scale a row, inputs whose second moments have a wide spectrum."""
    k, n = 64, 512
    native = torch.randn(n, k, generator=generator(18), dtype=torch.float64).sign() * torch.linspace(0.5, 2, k).double()
    weight = native @ random_orthogonal(k, generator(19)).double().T
    x = torch.randn(4096, k, generator=generator(20), dtype=torch.float64) * torch.logspace(0, -2, k).double()
    gram = x.T @ x / len(x)
    spec = QuantSpec(bits=3, group_size=-1, half_zeros=True, refine=3)

    def left(basis, gain):
        turned = ((weight @ basis) / gain).float()
        moments = gain[:, None] * (basis.T @ gram @ basis) * gain
        stored = quantize_weight(turned, moments, spec)
        error = dequantize(stored["qweight"], stored["scales"], stored["zeros"], 3).double() - turned
        return float(((error @ moments) * error).sum())

    random = random_orthogonal(k, generator(21)).double()
    fitted = fit_basis(random, [[StreamWeight(weight.float(), 1.0)]] * 300, 300)
    gain = even_scales((weight @ fitted).square().sum(0))
    assert left(fitted, gain) < 0.6 * left(random, torch.ones(k, dtype=torch.float64))


@pytest.fixture
def reads(monkeypatch):
    """How often a block was read while a basis was fitted, for each basis."""
    blocks, counts = [], []
    block, fit = fitting.DenseModel.block, fitting.fit_basis
    monkeypatch.setattr(fitting.DenseModel, "block", lambda *given: blocks.append(given) or block(*given))

    def counted(*given):
        blocks.clear()
        found = fit(*given)
        counts.append(len(blocks))
        return found

    monkeypatch.setattr(fitting, "fit_basis", counted)
    return counts


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


def test_what_is_kept_stays_and_norms_hold_the_gains(dense, tmp_path, monkeypatch):
    seen = []

    class Watched(fitting.Fitting):
        def fitted(self, spec, progress):
            seen.append((self._rotations, self._num_kept, super().fitted(spec, progress)))
            return seen[0][2]

    monkeypatch.setattr("rosaq.pipeline.run.Fitting", Watched)
    recipe = make_recipe("rosaq-gptq", preset="fast", target_bits=4.6)
    recipe = replace(recipe, budget=replace(recipe.budget, most=16))
    quantize(dense, tmp_path / "out", recipe=recipe, preset="fast", **SMALL)
    [(before, num_kept, after)] = seen
    assert num_kept >= 1
    assert torch.equal(after.residual[:, :num_kept], before.residual[:, :num_kept])
    assert_tight(after.residual.T @ after.residual, eye(64))
    reader = WeightReader(tmp_path / "out")
    for norm, gains in after.gains.items():
        assert (gains[:, :num_kept] == 1).all()
        assert (gains[:, num_kept:].std(1) > 0.01).all()
        for index, gain in enumerate(gains):
            assert torch.equal(reader.get(f"model.layers.{index}.{norm}.weight").double(), gain)
    assert all(not torch.equal(a, b) for a, b in zip(after.values, before.values, strict=True))


def test_a_block_that_a_step_sees_whole_is_read_for_every_step(dense, tmp_path, reads):
    quantize(dense, tmp_path / "out", preset="fast", **SMALL)
    assert reads == [make_recipe(preset="fast").rotation.fit_steps]


def test_large_weights_are_looked_at_a_part_at_a_time(dense, tmp_path, monkeypatch, reads):
    """Rows are drawn anew each step: another part each time, and never more than was said. A block is read for a few
    steps at once."""
    sizes = []
    loss = StreamWeight.loss
    monkeypatch.setattr(fitting, "_AT_ONCE", 48)
    monkeypatch.setattr(
        StreamWeight, "loss", lambda self, basis: (sizes.append(self.weight.shape), loss(self, basis))[1]
    )
    quantize(dense, tmp_path / "out", target_bits=4.6, preset="fast", **SMALL)
    assert {tuple(size) for size in sizes} == {(48, 64), (64, 48)}
    assert reads == [make_recipe(preset="fast").rotation.fit_steps // 4]


def test_heads_alone_may_be_fitted_and_unkept_axes_are_mixed_all_the_same(dense, tmp_path, monkeypatch):
    mixed = []
    mix = run.mix_unkept
    monkeypatch.setattr(run, "mix_unkept", lambda *given: mixed.append(mix(*given)) or mixed[0])
    seen = []
    heads = fitting.fit_heads
    monkeypatch.setattr(fitting, "fit_heads", lambda *given: seen.append(heads(*given)) or seen[-1])
    recipe = make_recipe("rosaq-gptq", preset="fast", target_bits=4.6, group_size=32)
    recipe = replace(recipe, rotation=RotationSpec("pca-random", "fitted", "hadamard"))
    made = quantize(dense, tmp_path / "out", recipe=recipe, preset="fast", **SMALL)
    assert made.rotation_error < 1e-4
    assert len(mixed) == 1
    assert len(seen) == 2
    assert (WeightReader(tmp_path / "out").get("model.layers.0.input_layernorm.weight") == 1).all()  # no gains


@pytest.mark.parametrize("keeps", [0, 2])
def test_fitted_rotations_without_a_budget(keeps, dense, tmp_path):
    """One width everywhere: what errors cost is measured all the same. And without any principal directions."""
    recipe = make_recipe("rosaq-gptq", preset="fast", bits=4)
    recipe = replace(recipe, salient=SalientSpec(keeps, sites=("residual",)))
    made = quantize(dense, tmp_path / "out", recipe=recipe, preset="fast", **SMALL)
    assert made.rotation_error < 1e-4
    assert {layer["num_salient"] for layer in made.layers} == {0, keeps}


def test_steps_are_checked_and_presets_take_more_or_fewer():
    with pytest.raises(ValueError, match="fit_steps: got 0, need at least 1"):
        RotationSpec("pca-fitted", fit_steps=0)
    steps = [make_recipe("rosaq-gptq", preset=name).rotation.fit_steps for name in ("fast", "default", "best")]
    assert steps == sorted(set(steps))
    own = make_recipe("rosaq-gptq")
    own = replace(own, rotation=replace(own.rotation, fit_steps=40))
    assert make_recipe(own, preset="fast").rotation.fit_steps == 10
    assert make_recipe("quarot", preset="fast").rotation == make_recipe("quarot", preset="best").rotation
