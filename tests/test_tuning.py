"""Block-wise tuning: what is stored is what was tuned, and the tuned block is nearer to the dense one on new tokens."""

from dataclasses import replace

import pytest
import torch

from rosaq.calibrate import BlockModel
from rosaq.config import LinearFormat
from rosaq.layout import dense_weight, unpack, zero_points
from rosaq.quantizers import quantize_weight
from rosaq.recipes import RECIPES
from rosaq.specs import QuantSpec, TuneSpec
from rosaq.tuning import Sequences, TunedBlock, TunedLinear, TuningTokens, tune_block
from rosaq.tuning.block import block_loss
from rosaq.tuning.descent import draw_batches
from tests.models import random_linear, save_dense, tiny_llama
from tests.tolerances import assert_close_in, assert_tight

FORMATS = [
    LinearFormat(3, 32),
    LinearFormat(4, 64, True, 3),
    LinearFormat(3, -1, False, 2, "basis"),
    LinearFormat(3, 32, True, 2, "basis", 1, 16),
    LinearFormat(4, 32, False, 1, "index", 4, 32),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuned_linear(fmt, seed=0):
    stored = random_linear(fmt, 16, 128, seed)
    weight = dense_weight(stored, replace(fmt, rotation_blocks=0, rotation_size=0)) + 0.01 * randn(16, 128)
    return stored, TunedLinear(weight, stored, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_an_untouched_linear_stores_what_it_was_given(fmt):
    stored, linear = tuned_linear(fmt)
    after = linear.stored()
    assert after.keys() == stored.keys()
    for name, tensor in stored.items():
        assert after[name].dtype == tensor.dtype
        if name == "salient_weight":
            assert_close_in(after[name], tensor, torch.float16)
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_stored_tensors_are_the_tuned_weight_bit_for_bit(fmt):
    stored, linear = tuned_linear(fmt)
    move = 2 * randn(16, 128, seed=1)
    if fmt.num_salient and fmt.salient == "index":
        move[:, stored["salient_index"].long()] = 0
    with torch.no_grad():
        linear.latent += move.view_as(linear.latent)
        linear.stretch += 0.1 * randn(*linear.stretch.shape, seed=2)
        if linear.shift is not None:
            linear.shift += randn(*linear.shift.shape, seed=3)
    after = linear.stored()
    assert torch.equal(dense_weight(after, fmt), linear.weight())
    changed = (unpack(after["qweight"], fmt.bits) != unpack(stored["qweight"], fmt.bits)).float().mean()
    assert changed > 0.3


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.num_salient and fmt.salient == "index"], ids=str)
def test_codes_of_salient_columns_never_move(fmt):
    stored, linear = tuned_linear(fmt)
    (linear.weight() * randn(16, 128, seed=4)).sum().backward()
    index = stored["salient_index"].long()
    slope = linear.latent.grad.view(16, 128)
    assert not slope[:, index].any()
    assert slope.count_nonzero() == 16 * (128 - len(index))


def test_gradients_pass_the_rounding_and_stop_at_clamped_codes():
    fmt = LinearFormat(3, 32)
    _, linear = tuned_linear(fmt)
    with torch.no_grad():
        linear.latent[0, 0, :4] = torch.tensor([-3.0, 0.2, 6.9, 12.0])
    linear.weight().sum().backward()
    scale = linear.stored()["scales"][0, 0].float()
    assert torch.equal(linear.latent.grad[0, 0, :4], torch.tensor([0.0, 1.0, 1.0, 0.0]) * scale)
    zero = zero_points(linear.stored()["zeros"])[..., None]
    steps = linear.latent.detach().round().clamp(0, 7) - zero
    want = (steps.sum(-1, keepdim=True) * linear.stored()["scales"].float()[..., None]).double()
    assert_close_in(linear.stretch.grad.flatten(), want.flatten(), torch.float16)


def test_a_changed_code_does_not_touch_what_the_basis_holds():
    fmt = LinearFormat(3, 32, False, 2, "basis")
    stored, linear = tuned_linear(fmt)
    basis = stored["salient_basis"].float()
    before = linear.weight().detach() @ basis
    with torch.no_grad():
        linear.latent += 2 * randn(*linear.latent.shape, seed=1)
    assert_close_in((linear.weight().detach() @ basis).flatten(), before.flatten(), torch.float16)


def test_token_weights_are_importance_over_energy():
    targets = randn(2, 5, 8).double()
    importance = torch.rand(2, 5, dtype=torch.float64) + 0.1
    want = importance / importance.mean() / targets.square().sum(-1)
    once, thrice = Sequences([targets]), Sequences(3 * targets.split(1))
    assert_tight(TuningTokens(once, once, importance).weights(), want)
    assert_tight(TuningTokens(once, Sequences([3 * targets])).weights(), 1 / targets.square().sum(-1) / 9)
    assert len(thrice) == 6
    assert torch.equal(thrice.at(torch.tensor([5, 0])), targets[[1, 0]])


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny block quantised by GPTQ, and tokens whose stream has drifted from the dense model's."""
    dense = tiny_llama(seed=3)
    model = BlockModel(save_dense(tmp_path_factory.mktemp("tune") / "dense", dense))
    weights = {name: t.float() for name, t in dense.model.layers[0].state_dict().items()}
    spec, fmt = QuantSpec(3, 32), LinearFormat(3, 32, False, 2)
    clean = randn(24, 32, 64)
    drifted = clean + 0.1 * clean.roll(1, -1)
    made, weights_of = {}, dict(weights)
    for site in model.family.sites:
        x = model.inputs_of(0, weights, clean, [site]).inputs[site.name].x.double()
        for name in site.linears:
            made[name] = quantize_weight(weights[f"{name}.weight"], x.T @ x / len(x), spec, torch.arange(2))
    tokens = TuningTokens(Sequences([drifted]), Sequences([model.run(0, weights_of, clean)]), torch.ones(24, 32))
    return model, weights, fmt, made, tokens


def block_of(setting):
    _, weights, fmt, made, _ = setting
    linears = {name: TunedLinear(weights[f"{name}.weight"], made[name], fmt) for name in made}
    gains = {name: tensor for name, tensor in weights.items() if "norm" in name}
    return TunedBlock(linears, gains, {}, torch.float16)


def part(tokens, which):
    numbers = torch.arange(24)[which]
    inputs, targets = (Sequences([each.at(numbers)]) for each in (tokens.inputs, tokens.targets))
    return TuningTokens(inputs, targets, tokens.importance[which])


def test_tuning_lowers_the_loss_on_tokens_it_has_not_seen(setting):
    model, *_, tokens = setting
    seen, unseen = part(tokens, slice(0, 16)), part(tokens, slice(16, 24))
    block = block_of(setting)
    before = block_loss(model, 0, block, unseen)
    spec = TuneSpec(steps=64, batch_size=8, passes=64, scales_rate=5e-3, gains_rate=5e-3, salient_rate=5e-2)
    first, last = tune_block(model, 0, block, seen, spec, seed=0)
    assert last < 0.95 * first
    assert block_loss(model, 0, block, unseen) < 0.97 * before
    again = block_of(setting)
    assert tune_block(model, 0, again, seen, spec, seed=0) == (first, last)
    for name, linear in block.linears.items():
        for key, tensor in linear.stored().items():
            assert torch.equal(tensor, again.linears[name].stored()[key]), (name, key)


@pytest.mark.parametrize(("steps", "passes", "want"), [(5, 9, 5), (50, 2, 16), (50, 1, 8)])
def test_every_sequence_comes_once_before_any_comes_again(steps, passes, want):
    batches = draw_batches(24, steps, TuneSpec(batch_size=3, passes=passes), seed=1)
    assert len(batches) == want
    once = torch.cat(batches[:8])
    assert len(once.unique()) == len(once)


def test_gains_are_stored_as_they_were_tuned(setting):
    model, *_, tokens = setting
    block = block_of(setting)
    tune_block(model, 0, block, tokens, TuneSpec(steps=4, gains_rate=1e-2), seed=0)
    for gain in block.gains().values():
        assert torch.equal(gain.half().float(), gain)
        assert (gain != 1).any()


def test_refusals():
    with pytest.raises(ValueError, match="steps: got -1, need 0 or more"):
        TuneSpec(steps=-1)
    with pytest.raises(ValueError, match="model_steps: got -2, need 0 or more"):
        TuneSpec(model_steps=-2)
    with pytest.raises(ValueError, match="passes: got 0, need at least 1"):
        TuneSpec(passes=0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        TuneSpec(batch_size=0)
    with pytest.raises(ValueError, match=r"codes_rate: got -0\.1"):
        TuneSpec(codes_rate=-0.1)
    with pytest.raises(ValueError, match="tune: got steps with moments 'quantised', need 'dense'"):
        replace(RECIPES["gptq"], tune=TuneSpec(steps=3))


def test_a_loss_that_is_not_finite_names_the_block(setting):
    model, *_, tokens = setting
    block = block_of(setting)
    inputs = tokens.inputs.at(torch.arange(24))
    inputs[0, 0, 0] = torch.inf
    bad = TuningTokens(Sequences([inputs]), tokens.targets, tokens.importance)
    with pytest.raises(ValueError, match=r"tuning: model\.layers\.0: got a loss of nan"):
        tune_block(model, 0, block, bad, TuneSpec(steps=1, batch_size=24), seed=0)
