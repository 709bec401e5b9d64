"""Bits and directions shared out between sites: what is predicted, that the budget is kept, what is refused."""

import json
from dataclasses import replace

import pytest
import torch

import rosaq
from rosaq.calibrate import BlockModel, drawn_labels, site_gradients
from rosaq.checkpoint import read_config
from rosaq.config import GROUP_SIZES, LinearFormat
from rosaq.linear import RosaqLinear
from rosaq.pipeline import quantize, run
from rosaq.pipeline.budget import SiteChoice, SiteFacts, share_out, spectrum_of, squared_steps, stored_bits
from rosaq.pipeline.rotations import mix_unkept
from rosaq.quantizers import NotPositiveDefiniteError, quantize_weight
from rosaq.recipes import make_recipe
from rosaq.specs import BudgetSpec, QuantSpec, RotationSpec
from tests.families import save_family, tiny_family
from tests.models import SMALL, save_dense, tiny_llama
from tests.tolerances import assert_tight

K, N = 64, 32
GROUPED = QuantSpec(group_size=32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(sensitivity=1.0, decay=0.0, most=4, spikes=0, height=1e4):
    """Facts of a [32, 64] linear whose second moments fall like exp(-decay * i) behind `spikes` that are far larger."""
    values = torch.exp(-decay * torch.arange(K, dtype=torch.float64))
    values[:spikes] *= height
    kept, rest, energy = spectrum_of(torch.diag(values), most, 0.0, torch.arange(most))
    base = LinearFormat(3, 32, num_salient=1)
    return SiteFacts(((K, N),), base, sensitivity, {(3, 32): 1 / 49, (4, 32): 1 / 225}, kept, rest, energy)


def test_a_diagonal_gram_leaves_the_geometric_mean_of_what_is_not_kept():
    fact = site(sensitivity=3.0, decay=0.05)
    values = torch.exp(-0.05 * torch.arange(K, dtype=torch.float64))
    for count in range(5):
        want = 3.0 * (K - count) * values[count:].log().mean().exp() / 49 / 12
        assert fact.loss(SiteChoice(3, count, 32)) == pytest.approx(float(want), rel=1e-7)  # the least damping
    assert fact.loss(SiteChoice(4, 1, 32)) / fact.loss(SiteChoice(3, 1, 32)) == pytest.approx(49 / 225)


def test_principal_directions_and_channels_agree_on_a_diagonal_gram():
    gram = torch.diag(torch.linspace(5, 1, K, dtype=torch.float64))
    channels, basis = spectrum_of(gram, 3, 0.01, torch.arange(3)), spectrum_of(gram, 3, 0.01, None)
    assert_tight(channels[0], basis[0])
    assert channels[2] == pytest.approx(basis[2])
    # the damping is a share of the mean of what is left in both
    assert_tight(channels[1][3:], basis[1][3:])


def test_without_directions_the_determinant_is_all_there_is_to_know():
    gram = randn(K, 3 * K) @ randn(3 * K, K, seed=1)
    gram = gram @ gram.T
    kept, rest, energy = spectrum_of(gram, 0, 0.01, None)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    assert len(kept) == 0
    assert_tight(rest, torch.linalg.eigvalsh(damped).log().sum()[None])
    assert energy == pytest.approx(float(gram.trace()))


def test_a_singular_matrix_is_damped_more_and_that_is_told():
    x = randn(K // 2, K).double()
    with pytest.warns(RuntimeWarning, match=r"not positive definite: damping doubled"):
        _, rest, _ = spectrum_of(x.T @ x - 1e-7 * len(x) * torch.eye(K), 0, 0.0, None)
    assert rest.isfinite().all()
    with pytest.raises(NotPositiveDefiniteError, match="need a finite positive number"):
        spectrum_of(torch.full((K, K), torch.nan, dtype=torch.float64), 0, 0.01, None)


def test_the_bits_of_a_site_are_those_of_its_stored_tensors():
    for fmt in (LinearFormat(3, 32, False, 2), LinearFormat(4, 64, True, 3, "basis"), LinearFormat(3, -1)):
        shapes = fmt.tensor_shapes(K, N)
        made = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()}
        assert stored_bits(fmt, K, N) == 8 * sum(tensor.nbytes for tensor in made.values())


def test_more_bits_go_where_errors_cost_more_and_the_budget_is_kept():
    facts = [{"a": site(1.0), "b": site(100.0)}, {"a": site(50.0), "b": site(2.0)}]
    least = sum(f.bits(SiteChoice(3, 0, 32)) for block in facts for f in block.values()) / (4 * K * N)
    chosen = share_out(facts, BudgetSpec(target_bits=least + 0.5), GROUPED)
    assert [[c.bits for c in block.values()] for block in chosen] == [[3, 4], [4, 3]]
    assert [[c.num_salient for c in block.values()] for block in chosen] == [[0, 0], [0, 0]]  # codes gain more here
    used = sum(facts[i][name].bits(choice) for i, block in enumerate(chosen) for name, choice in block.items())
    assert used <= (least + 0.5) * 4 * K * N


def test_directions_go_where_the_spectrum_is_steep():
    facts = [{"flat": site(), "spiked": site(spikes=3)}]
    least = facts[0]["flat"].bits(SiteChoice(3, 0, 32)) / (K * N)
    room = BudgetSpec(target_bits=least + 1.7 * 16 / K, widths=(3,), most=4)  # three directions, for either of them
    chosen = share_out(facts, room, GROUPED)
    assert (chosen[0]["flat"].num_salient, chosen[0]["spiked"].num_salient) == (0, 3)


def test_a_direction_that_towers_comes_before_a_wider_code():
    facts = [{"towering": site(most=1, spikes=1, height=1e24), "flat": site(sensitivity=2.0, most=1)}]
    least = facts[0]["flat"].bits(SiteChoice(3, 0, 32)) / (K * N)
    chosen = share_out(facts, BudgetSpec(target_bits=least + 0.5, most=1), GROUPED)
    assert chosen[0]["towering"] == SiteChoice(3, 1, 32)


def test_directions_by_energy_are_the_fewest_that_hold_the_share():
    values = torch.exp(-0.7 * torch.arange(K, dtype=torch.float64))
    facts = [{"a": site(decay=0.7, most=8)}]
    for share in (0.3, 0.6, 0.9):
        count = share_out(facts, BudgetSpec(energy=share), replace(GROUPED, bits=4))[0]["a"]
        held = torch.cumsum(values, 0) / values.sum()
        assert count == SiteChoice(4, int((held < share).sum()) + 1, 32)
    assert share_out(facts, BudgetSpec(energy=0.9999), GROUPED)[0]["a"].num_salient == 8


def test_the_predicted_loss_is_what_gptq_leaves():
    """On correlated inputs, without clipping, within a third; and its ratio between 3 and 4 bits."""
    mix = torch.linalg.qr(randn(K, K))[0]
    gram = mix * torch.exp(-0.08 * torch.arange(K, dtype=torch.float64)) @ mix.T
    weight = randn(256, K, seed=1).float()
    kept, rest, energy = spectrum_of(gram, 1, 0.01, torch.arange(1))
    spec = QuantSpec(3, 32, method="gptq", clip=False)
    steps = squared_steps([weight], [(3, 32), (4, 32)], False)
    fact = SiteFacts(((K, 256),), LinearFormat(3, 32), 256.0, steps, kept, rest, energy)
    losses = {}
    for bits in (3, 4):
        stored = quantize_weight(weight, gram, replace(spec, bits=bits))
        error = RosaqLinear.from_tensors(stored, LinearFormat(bits, 32)).dequantize().double() - weight
        losses[bits] = float(((error @ gram) * error).sum())
        assert fact.loss(SiteChoice(bits, 0, 32)) == pytest.approx(losses[bits], rel=1 / 3)
    assert losses[4] / losses[3] == pytest.approx(49 / 225, rel=0.2)


def test_gradients_at_the_sites_are_those_of_the_predictions(tmp_path):
    """Against autograd through the whole transformers model, for the same drawn labels."""
    dense = tiny_llama(seed=2)
    model = BlockModel(save_dense(tmp_path / "dense", dense))
    dense = dense.float()
    ids = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
    weights = [{n: t.detach() for n, t in layer.state_dict().items()} for layer in dense.model.layers]
    gain, head = dense.model.norm.weight.detach(), dense.lm_head.weight.detach()
    embedded = dense.model.embed_tokens(ids).detach()
    given = (model, weights.__getitem__, gain, head, embedded)
    got = {}
    for part in site_gradients(*given, torch.Generator().manual_seed(7)):
        for name, slope in part.slopes.items():
            got.setdefault((part.index, name), []).append(slope)
            assert part.x.shape == (len(slope), model.linear_sizes()[name][0])

    outputs = {}
    for i, layer in enumerate(dense.model.layers):
        for name in model.family.linears:
            layer.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, key=(i, name): outputs.update({key: out})
            )
    logits = dense(ids).logits
    labels = drawn_labels(logits.detach().softmax(-1).flatten(0, 1), torch.Generator().manual_seed(7))
    score = logits.flatten(0, 1).log_softmax(-1).gather(1, labels[:, None]).sum()
    keys = list(outputs)
    for key, gradient in zip(keys, torch.autograd.grad(score, [outputs[key] for key in keys]), strict=True):
        mine = torch.cat(got.pop(key)).view_as(gradient)
        assert (mine - gradient).norm() <= 1e-3 * gradient.norm(), key
    assert not got


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_labels_are_drawn_as_often_as_they_are_probable(vocab):
    probabilities = torch.rand(vocab, generator=torch.Generator().manual_seed(0)).pow(4)
    probabilities[0] = probabilities[-1] = 0
    probabilities /= probabilities.sum()
    labels = drawn_labels(probabilities.expand(20_000, vocab), torch.Generator().manual_seed(1))
    shares = torch.bincount(labels, minlength=vocab) / len(labels)
    assert len(shares) == vocab
    assert not shares[[0, -1]].any()
    assert ((shares - probabilities).abs() <= 5 * (probabilities / len(labels)).sqrt() + 1e-4).all()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


def test_a_target_is_met_and_the_checkpoint_runs(dense, tmp_path):
    made = quantize(dense, tmp_path / "out", target_bits=4.6, preset="fast", **SMALL)
    assert 4.4 < made.bits_per_weight <= 4.6
    formats = {(layer["bits"], layer["num_salient"]) for layer in made.layers}
    assert {bits for bits, _ in formats} == {3, 4}
    config = read_config(tmp_path / "out")
    for layer in made.layers:
        fmt = config.format_of(layer["name"])
        assert (fmt.bits, fmt.num_salient) == (layer["bits"], layer["num_salient"])
    assert rosaq.evaluate(tmp_path / "out", reference=dense, windows=2, context=32, text=SMALL["calibration"]).kl < 1
    again = quantize(dense, tmp_path / "again", target_bits=4.6, preset="fast", **SMALL)
    assert again.layers == made.layers


def test_axes_that_no_site_keeps_are_mixed_into_the_rest(dense, tmp_path, monkeypatch):
    """Of the axes that sites could have had, alone in channels of their own, those that one has are left."""
    seen = []

    def mix(rotations, num_kept, seed):
        seen.append((rotations.residual, num_kept, mix_unkept(rotations, num_kept, seed).residual))
        return mix_unkept(rotations, num_kept, seed)

    monkeypatch.setattr(run, "mix_unkept", mix)
    recipe = make_recipe(target_bits=4.6, group_size=32, preset="fast")
    budget = replace(recipe.budget, most=16)
    recipe = replace(recipe, rotation=RotationSpec("pca-random", "random", "hadamard"), budget=budget)
    made = quantize(dense, tmp_path / "out", recipe=recipe, preset="fast", **SMALL)
    [(before, num_kept, after)] = seen
    reads_stream = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    counts = [layer["num_salient"] for layer in made.layers if layer["name"].endswith(reads_stream)]
    assert num_kept == max(counts) >= 1
    assert torch.equal(after[:, :num_kept], before[:, :num_kept])
    assert_tight(after.T @ after, torch.eye(len(after), dtype=torch.float64))
    turned = before.T @ after
    assert turned[num_kept:, :num_kept].abs().max() < 1e-12
    assert turned[num_kept:, num_kept:].abs().max() < 0.9  # no axis is alone any more


def test_the_default_keeps_no_directions_unless_they_are_asked_for(dense, tmp_path):
    assert make_recipe(bits=4).salient.count == make_recipe().budget.most == 0
    made = quantize(dense, tmp_path / "out", target_bits=4.6, preset="fast", **SMALL)
    assert {layer["num_salient"] for layer in made.layers} == {0}
    recipe = make_recipe(preset="fast")
    room = replace(recipe.budget, target_bits=4.3, widths=(3,), most=3)  # of one width bits can buy nothing else
    wider = quantize(dense, tmp_path / "wide", recipe=replace(recipe, budget=room), preset="fast", **SMALL)
    counts = {layer["name"].rpartition(".")[2]: layer["num_salient"] for layer in wider.layers}
    assert counts["q_proj"]
    assert counts["up_proj"]
    assert counts["o_proj"] == counts["down_proj"] == 0  # SalientSpec.sites


def test_directions_by_energy_end_to_end(dense, tmp_path):
    made = quantize(dense, tmp_path / "out", salient_energy=0.5, preset="fast", **SMALL)
    counts = {layer["num_salient"] for layer in made.layers}
    assert len(counts) > 1
    assert {layer["bits"] for layer in made.layers} == {3}
    saved = json.loads((tmp_path / "out" / "rosaq_layers.json").read_text())
    assert saved["recipe"]["budget"]["energy"] == 0.5


def test_the_default_shares_bits_out_until_something_uniform_is_said():
    default = make_recipe()
    assert (default.budget.target_bits, default.quant.group_size) == (3.45, -1)
    assert make_recipe(salient_energy=0.5).budget.most == BudgetSpec.most
    assert make_recipe(target_bits=3.6).quant.group_size == -1
    assert make_recipe(target_bits=3.6, group_size=32).quant.group_size == 32
    uniform = {"bits": 4}, {"group_size": 64}, {"salient": 3}, {"salient_energy": 0.5}
    for said in uniform:
        recipe = make_recipe(**said)
        assert (recipe.budget.target_bits, recipe.quant.group_size) == (None, 64), said
        assert recipe.quant.bits == said.get("bits", 3)
    assert make_recipe("gptq") == make_recipe("gptq", bits=3, group_size=64)
    own = replace(default, name="mine")
    grouped = make_recipe(own, group_size=32)  # whoever wrote a recipe meant its budget
    assert (grouped.budget, grouped.quant.group_size) == (own.budget, 32)
    for said in {"bits": 4}, {"salient": 0}:
        with pytest.raises(ValueError, match=f"{next(iter(said))}: got . with a budget, which chooses it"):
            make_recipe(own, **said)
    by_energy = replace(own, budget=BudgetSpec(energy=0.5))
    assert make_recipe(by_energy, bits=4).quant.bits == 4
    with pytest.raises(ValueError, match="salient: got 3 with a budget, which chooses it"):
        make_recipe(by_energy, salient=3)


def test_what_fourth_bits_leave_buys_small_groups_where_they_gain_most():
    wide = {(3, -1): 4 / 49, (4, -1): 4 / 225, (4, 64): 3.6 / 225, (4, 32): 3.2 / 225}
    facts = [{name: replace(site(cost, most=0), squared_step=wide) for name, cost in {"a": 1.0, "b": 4.0}.items()}]
    whole_rows = QuantSpec(group_size=-1)
    reach = [facts[0]["a"].bits(SiteChoice(bits, 0, size)) / (K * N) for bits, size in ((4, -1), (4, 32))]

    def shared(target):
        chosen = share_out(facts, BudgetSpec(target_bits=target), whole_rows)[0]
        assert sum(facts[0][name].bits(choice) for name, choice in chosen.items()) <= target * 2 * K * N
        return [(chosen[name].bits, chosen[name].group_size) for name in ("a", "b")]

    assert shared(reach[0]) == [(4, -1), (4, -1)]
    assert shared(sum(reach) / 2) == [(4, -1), (4, 32)]
    assert shared(reach[1]) == [(4, 32), (4, 32)]
    assert shared(reach[0] - 0.3)[0] == (3, -1)  # groups are for codes of the largest width
    with pytest.raises(ValueError, match="target_bits: got 9, need"):
        shared(9)


def test_only_high_targets_of_recipes_by_name_choose_groups():
    """On SmolLM2-135M 4.31 bits are worth more that way than as directions (docs/experiments.md)."""
    for target, sizes in {3.45: (), 3.99: (), 4.0: GROUP_SIZES, 4.31: GROUP_SIZES}.items():
        assert make_recipe(target_bits=target).budget.group_sizes == sizes, target
    assert make_recipe(target_bits=4.31, group_size=64).budget.group_sizes == ()
    assert make_recipe(bits=4).budget.group_sizes == ()
    assert make_recipe(replace(make_recipe(), name="mine"), target_bits=4.31).budget.group_sizes == ()
    with pytest.raises(ValueError, match=r"group_sizes: got \(96,\), need some of \(128, 64, 32\)"):
        BudgetSpec(target_bits=4.31, group_sizes=(96,))


def test_a_high_target_is_met_in_groups_unless_whole_rows_are_said(dense, tmp_path):
    request = {name: value for name, value in SMALL.items() if name != "group_size"}
    whole = {"group_size": -1}
    for name, said, target, sizes in (
        ("some", {}, 4.7, {-1, 32, 64}),
        ("rows", whole, 4.4, {-1}),
    ):
        made = quantize(dense, tmp_path / name, target_bits=target, preset="fast", **request | said)
        config = read_config(tmp_path / name)
        assert {config.format_of(layer["name"]).group_size for layer in made.layers} == sizes, name
        assert made.bits_per_weight <= target
        assert rosaq.verify(tmp_path / name).is_sound


@pytest.mark.filterwarnings("ignore:.*runs on a CPU only:UserWarning")
def test_groups_that_no_gpu_takes_are_told(tmp_path):
    source = save_dense(
        tmp_path / "dense",
        tiny_llama(hidden_size=192, intermediate_size=192, num_attention_heads=12, num_key_value_heads=6),
    )
    with pytest.warns(UserWarning, match="group_size: got 96, which runs on a CPU only"):
        quantize(source, tmp_path / "out", recipe="rtn", **SMALL | {"group_size": 96})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:.*got a recipe that rotates the residual stream:UserWarning")
def test_whole_rows_under_a_target_in_every_family(family, tmp_path):
    """The default recipe but for its target, which such narrow rows cannot reach."""
    source = save_family(tmp_path / "dense", tiny_family(family))
    made = quantize(source, tmp_path / "out", target_bits=4.4, preset="fast", **SMALL | {"group_size": -1})
    assert 4.2 < made.bits_per_weight <= 4.4
    config = read_config(tmp_path / "out")
    assert {config.format_of(layer["name"]).group_size for layer in made.layers} == {-1}
    result = rosaq.evaluate(tmp_path / "out", reference=source, windows=2, context=32, text=SMALL["calibration"])
    assert result.kl < 1


def test_refusals(dense, tmp_path):
    with pytest.raises(ValueError, match=r"target_bits: got 3\.0, need [34]\.\d+ to \d+\.\d+ for this model"):
        quantize(dense, tmp_path / "low", target_bits=3.0, preset="fast", **SMALL)
    with pytest.raises(ValueError, match="salient: got 3 with a budget, which chooses it"):
        make_recipe(salient=3, target_bits=3.5)
    with pytest.raises(ValueError, match="bits: got 4 with a budget, which chooses it"):
        make_recipe(bits=4, target_bits=3.5)
    with pytest.raises(ValueError, match=r"energy: got 0\.5 with target_bits 3\.5, need one of them"):
        make_recipe(salient_energy=0.5, target_bits=3.5)
    with pytest.raises(ValueError, match=r"energy: got 1\.5, need 0 < energy < 1"):
        BudgetSpec(energy=1.5)
    for said in {"target_bits": 3.5}, {"salient_energy": 0.5}:
        [name] = said
        with pytest.raises(ValueError, match=f"{name}: got .* with recipe 'gptq', whose moments are 'quantised', need"):
            make_recipe("gptq", **said)
    with pytest.raises(ValueError, match="budget: got one with moments 'quantised', need 'dense'"):
        replace(make_recipe("gptq"), budget=BudgetSpec(target_bits=3.5))
