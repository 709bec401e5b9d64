"""Tuning the whole model: the way back through checkpointed blocks is the true gradient, and codes stay."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from rosaq.calibrate import BlockModel
from rosaq.config import LinearFormat
from rosaq.quantizers import quantize_weight
from rosaq.specs import QuantSpec, TuneSpec
from rosaq.tuning import Predictions, TunedBlock, TunedLinear, tune_model
from rosaq.tuning.model import _divergence, _kl
from tests.models import random_linear, save_dense, tiny_llama
from tests.tolerances import assert_close_in, assert_same_function

FORMAT = LinearFormat(3, 32, False, 2)
SPEC = TuneSpec(model_steps=24, batch_size=4, passes=24, scales_rate=5e-3, gains_rate=5e-3, model_rates=1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, function that makes its quantised blocks anew, predictions on 72 sequences of noise)."""
    dense = tiny_llama(seed=5)
    model = BlockModel(save_dense(tmp_path_factory.mktemp("whole") / "dense", dense))
    embedded = torch.randn(72, 32, 64, generator=torch.Generator().manual_seed(0))
    weights = [{name: t.float() for name, t in layer.state_dict().items()} for layer in dense.model.layers]
    hidden = embedded
    for index, block in enumerate(weights):
        hidden = model.run(index, block, hidden)
    made = [
        {
            n: quantize_weight(w[f"{n}.weight"], None, QuantSpec(3, 32, method="rtn"), torch.arange(2))
            for n in model.family.linears
        }
        for w in weights
    ]
    for block in made:  # an error that scales can mend, unlike that of rounding random weights
        for stored in block.values():
            stored["scales"] *= 0.93

    def blocks():
        return [
            TunedBlock(
                {name: TunedLinear(None, stored, FORMAT) for name, stored in made[index].items()},
                {name: tensor for name, tensor in block.items() if "norm" in name},
                {},
                torch.float16,
            )
            for index, block in enumerate(weights)
        ]

    gain, head = dense.model.norm.weight.detach().float(), dense.lm_head.weight.detach().float()
    return model, blocks, Predictions(embedded, hidden, gain, head)


def part(predictions, which):
    return Predictions(predictions.embedded[which], predictions.dense[which], predictions.gain, predictions.head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fmt",
    [
        LinearFormat(3, -1),
        LinearFormat(4, -1, True, 3),
        LinearFormat(3, -1, False, 2, "basis"),
        LinearFormat(3, -1, False, 1, "basis", 1, 32),
        LinearFormat(4, -1, False, 2, "index", 4, 32),
        LinearFormat(4, 64, False, 2),
    ],
    ids=str,
)
def test_a_linear_whose_codes_stay_multiplies_as_its_weight_does(fmt, dtype):
    """Output and all gradients, against autograd through the dense weight; one row has a scale of zero."""
    generator = torch.Generator().manual_seed(0)
    stored = random_linear(fmt, 24, 128, seed=0)
    stored["scales"][5] = 0
    x, slope = (torch.randn(3, 40, size, generator=generator) for size in (128, 24))
    found = []
    for own in (True, False):
        tuned, leaf = TunedLinear(None, stored, fmt), x.clone().requires_grad_()
        with torch.no_grad():
            tuned.stretch += 0.1 * torch.randn(tuned.stretch.shape, generator=torch.Generator().manual_seed(1))
        weight = tuned.weight()  # in float32, as product makes it too
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = tuned.product(leaf) if own else linear(leaf, weight)
        y.backward(slope.to(y.dtype))
        leaves = [leaf, tuned.stretch] + ([] if tuned.shift is None else [tuned.shift])
        found.append((y, leaf.grad, *(tensor.grad.flatten(1).T for tensor in leaves[1:])))
    for mine, true in zip(*found, strict=True):
        assert mine.dtype == true.dtype
        assert_same_function(mine, true, dtype)
    if fmt.salient == "index":  # on a basis the salient weights are summed in another order
        assert torch.equal(found[0][0], found[1][0])


def test_a_block_adds_biases_to_what_its_own_linears_give_and_gets_its_own_back(tmp_path):
    dense = tiny_llama(seed=2, attention_bias=True)
    tensors = {name: t + 0.1 for name, t in dense.model.layers[1].state_dict().items()}
    model, hidden = BlockModel(save_dense(tmp_path / "biased", dense)), torch.randn(2, 16, 64)
    want = model.run(1, tensors, hidden)
    calls = {name: lambda x, name=name: linear(x, tensors[f"{name}.weight"]) for name in model.family.linears}
    rest = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in calls}
    assert any(name.endswith("q_proj.bias") for name in rest)
    with torch.no_grad():
        assert torch.equal(model.forward(1, rest, hidden, calls), want)
    assert torch.equal(model.run(1, tensors, hidden), want)
    with pytest.raises(RuntimeError, match="Missing key"), torch.no_grad():
        model.forward(1, rest, hidden)


def test_the_divergence_falls_on_sequences_it_has_not_seen_and_codes_stay(setting):
    model, make, predictions = setting
    blocks, steps = make(), []
    unseen = part(predictions, slice(64, 72))
    before = _divergence(model, blocks, unseen, torch.arange(8))
    codes = [linear._half_steps.clone() for block in blocks for linear in block.linears.values()]
    first, last = tune_model(
        model, blocks, part(predictions, slice(0, 64)), SPEC, seed=0, progress=lambda *step: steps.append(step)
    )
    assert last < 0.9 * first
    assert _divergence(model, blocks, unseen, torch.arange(8)) < 0.95 * before
    assert steps == [(step, 24) for step in range(1, 25)]
    linears = [linear for block in blocks for linear in block.linears.values()]
    assert all(torch.equal(linear._half_steps, old) for linear, old in zip(linears, codes, strict=True))
    assert not any("qweight" in linear.stored() for linear in linears)  # a second copy, packed, of what is on disk
    again = make()
    assert tune_model(model, again, part(predictions, slice(0, 64)), SPEC, seed=0, progress=lambda *_: None) == (
        first,
        last,
    )


def test_the_rates_of_its_steps_are_multiples_of_those_of_a_block(setting):
    """The same steps, whether all rates are doubled one by one or by model_rates."""
    model, make, predictions = setting
    few = replace(SPEC, model_steps=3)
    doubled = replace(few, scales_rate=1e-2, gains_rate=1e-2, salient_rate=2 * few.salient_rate)
    found = []
    for spec in (replace(few, model_rates=2), doubled, few):
        blocks = make()
        losses = tune_model(model, blocks, predictions, spec, seed=0, progress=lambda *_: None)
        found.append((losses, [tensor.detach().clone() for block in blocks for tensor, _ in block.groups(spec)]))
    (twice, moved), (by_hand, wanted), (once, _) = found
    assert twice == by_hand
    assert all(torch.equal(*pair) for pair in zip(moved, wanted, strict=True))
    assert twice[1] < once[1] < once[0]
    with pytest.raises(ValueError, match="model_rates: got 0, need a positive number"):
        replace(few, model_rates=0)


def test_what_is_left_on_the_tensors_is_the_gradient_of_the_divergence(setting):
    """Against autograd through the whole model at once, without checkpoints and with the loss written out."""
    model, make, predictions = setting
    blocks = make()
    groups = [tensor for block in blocks for tensor, _ in block.groups(SPEC)]
    one_step = TuneSpec(model_steps=1, batch_size=72, passes=1)
    tune_model(model, blocks, predictions, one_step, seed=0, progress=lambda *_: None)
    got = [tensor.grad.clone() for tensor in groups]
    fresh = make()
    hidden = predictions.embedded
    for index, block in enumerate(fresh):
        hidden = model.forward(index, block.tensors(), hidden)
    own, wanted = (model.final_norm(h, predictions.gain) @ predictions.head.T for h in (hidden, predictions.dense))
    loss = torch.nn.functional.kl_div(own.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
    (loss / (72 * 32)).backward()
    want = [tensor.grad for block in fresh for tensor, _ in block.groups(SPEC)]
    assert len(got) == len(want) > 20
    for mine, true in zip(got, want, strict=True):
        assert (mine - true).norm() <= 1e-3 * true.norm()


def test_the_divergence_is_kl_and_nothing_from_itself(setting):
    model, _, predictions = setting
    two = torch.tensor([3, 1])
    normed = model.final_norm(predictions.dense[two], predictions.gain)
    value, slope = _kl(model, normed, predictions, two)
    assert abs(value) < 1e-6
    assert slope.abs().max() < 1e-6
    other = normed.roll(1, -1)
    q, p = ((x.double() @ predictions.head.double().T).softmax(-1) for x in (other, normed))
    want = (p * (p / q).log()).sum(-1).mean()
    assert_close_in(torch.tensor([_kl(model, other, predictions, two)[0]]), want[None], torch.float32)


def test_a_divergence_that_is_not_finite_is_refused(setting):
    model, make, predictions = setting
    bad = Predictions(predictions.embedded.clone(), predictions.dense, predictions.gain, predictions.head)
    bad.embedded[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="tuning: the whole model: got a divergence of nan"):
        tune_model(model, make(), bad, TuneSpec(model_steps=1, batch_size=72), seed=0, progress=lambda *_: None)
