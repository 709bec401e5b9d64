"""Budgets for mixtures of experts: what is measured of experts, and that those of a block share what they get."""

from collections import defaultdict

import pytest
import torch

import rosaq
from rosaq.calibrate import drawn_labels, output_sensitivity
from rosaq.checkpoint import read_config
from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.pipeline import quantize
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site_facts import site_facts
from rosaq.pipeline.source import DenseModel
from rosaq.recipes import make_recipe
from tests.families import save_family, tiny_family
from tests.models import SMALL
from tests.tolerances import assert_same_function

NAMES = ("mixtral", "qwen3_moe")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:.*got fewer tokens than their:UserWarning")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {name: save_family(root / name, tiny_family(name)) for name in NAMES}


def measured(directory):
    """(model, hidden states after the embedding, arguments of the two ways to measure it)."""
    model = DenseModel(directory)
    hidden = model.blocks.embed(model.get(model.embedding_name), IDS)
    return model, hidden, (model.get(model.final_norm_name), model.get(model.head_name))


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_of_an_expert_is_that_of_the_tokens_routed_to_it(name, dense):
    """Against autograd through all blocks at once, for the same drawn labels."""
    model, hidden, final = measured(dense[name])
    blocks, family = model.blocks, model.blocks.family
    found = list(output_sensitivity(blocks, model.block, *final, hidden, torch.Generator().manual_seed(7)))[::-1]
    got = [each.squares for each in found]
    state, outputs, tokens = hidden.clone().requires_grad_(), [], []
    for index in range(2):
        state, out, inputs = blocks.forward_with_outputs(index, model.block(index), state)
        outputs.append(out)
        routed = [site for site in family.sites if site.expert is not None and site.name in inputs]
        tokens.append({linear: inputs[site.name].tokens for site in routed for linear in site.linears})
        for site in routed:
            assert torch.equal(found[index].inputs[site.name].x, inputs[site.name].x)
            assert torch.equal(found[index].inputs[site.name].tokens, inputs[site.name].tokens)
    logits = blocks.final_norm(state, final[0]) @ final[1].T
    labels = drawn_labels(logits.detach().softmax(-1).flatten(0, 1), torch.Generator().manual_seed(7))
    score = logits.flatten(0, 1).log_softmax(-1).gather(1, labels[:, None]).sum()
    for index in range(2):
        assert set(got[index]) - {"block"} == set(family.linears)
        gradients = torch.autograd.grad(score, list(outputs[index].values()), retain_graph=True)
        for linear, gradient in zip(outputs[index], gradients, strict=True):
            mine = got[index][linear].flatten()
            squares = gradient.square().sum(-1).flatten()
            if linear in tokens[index]:
                assert len(tokens[index][linear]) == len(squares) < IDS.numel()
                squares = torch.zeros(IDS.numel()).index_copy(0, tokens[index][linear], squares)
            assert_same_function(mine[:, None], squares[:, None])
    # every token goes to two experts
    chosen = sum((got[0][linear] > 0).int() for linear in family.linears if linear.endswith(("w2", "down_proj")))
    assert (chosen == 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_second_moments_are_added_up_over_the_experts(name, dense):
    model, hidden, final = measured(dense[name])
    recipe = make_recipe("rosaq-gptq", target_bits=4.0, preset="fast")
    *_, first = output_sensitivity(model.blocks, model.block, *final, hidden, torch.Generator().manual_seed(7))
    facts = site_facts(first, model.blocks, recipe, Rotations(), model.block(0))
    squares = first.squares
    sites = [site for site in model.blocks.family.sites if site.stage == "mlp_out"]
    inputs = model.blocks.inputs_of(0, model.block(0), hidden, sites).inputs
    assert len(sites) == 4
    assert set(facts) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    fact, total = facts["mlp_out"], 0.0
    gram = torch.zeros(inputs["mlp_out.0"].x.shape[1], inputs["mlp_out.0"].x.shape[1], dtype=torch.float64)
    for site in sites:
        x, cost = inputs[site.name].x.double(), squares[site.linears[0]].double()
        own = cost.flatten()[inputs[site.name].tokens]
        gram += x.T * own @ x
        total += float(cost.sum())
    assert fact.sensitivity == pytest.approx(total / IDS.numel())
    assert fact.energy == pytest.approx(float(torch.diagonal(gram).sum()) / total, rel=1e-5)
    values = torch.linalg.eigvalsh(gram / total).flip(0)
    assert fact.kept.tolist() == pytest.approx(values[: len(fact.kept)].tolist(), rel=1e-4)
    assert fact.num_weights == 4 * len(gram) * 64


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_met_and_experts_of_a_block_share_it(name, dense, tmp_path):
    made = quantize(dense[name], tmp_path / "out", target_bits=4.7, preset="fast", **SMALL)
    assert 4.5 < made.bits_per_weight <= 4.7
    config, shared = read_config(tmp_path / "out"), defaultdict(set)
    for layer in made.layers:
        fmt = config.format_of(layer["name"])
        assert (fmt.bits, fmt.num_salient) == (layer["bits"], layer["num_salient"])
        block, _, linear = layer["name"].partition(".mlp.experts.")
        if linear:
            shared[block, linear.partition(".")[2] in ("w2", "down_proj")].add((fmt.bits, fmt.num_salient))
    assert len(shared) == 4
    assert all(len(formats) == 1 for formats in shared.values())
    assert {layer["bits"] for layer in made.layers} == {3, 4}
    assert (
        rosaq.evaluate(tmp_path / "out", reference=dense[name], windows=2, context=32, text=SMALL["calibration"]).kl < 1
    )


def test_directions_by_energy(dense, tmp_path):
    made = quantize(dense["qwen3_moe"], tmp_path / "out", salient_energy=0.6, preset="fast", **SMALL)
    counts = {layer["name"]: layer["num_salient"] for layer in made.layers}
    for block in (0, 1):
        of_experts = {counts[f"model.layers.{block}.mlp.experts.{expert}.down_proj"] for expert in range(4)}
        assert len(of_experts) == 1
    assert len(set(counts.values())) > 1


def test_an_expert_that_no_token_reached_counts_in_the_bits_alone(tmp_path):
    """Its router's row is 0 where always two of four others are positive."""
    model = tiny_family("mixtral", num_local_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1], weight[3], weight[4] = -weight[0], -weight[2], 0
    source, hidden, final = measured(save_family(tmp_path / "dense", model))
    recipe = make_recipe("rosaq-gptq", target_bits=4.0, preset="fast")
    *_, first = output_sensitivity(source.blocks, source.block, *final, hidden, torch.Generator().manual_seed(7))
    facts = site_facts(first, source.blocks, recipe, Rotations(), source.block(0))
    assert "mlp_in.4" not in source.blocks.inputs_of(0, source.block(0), hidden, source.blocks.family.sites).inputs
    assert facts["mlp_in"].num_weights == 5 * 2 * 64 * 128
    assert facts["mlp_in"].sensitivity > 0


def test_the_longest_suffix_says_the_format():
    formats = {bits: LinearFormat(bits, size) for bits, size in ((3, 32), (4, 64))}
    config = CheckpointConfig(
        LinearFormat(3, 128), {"mlp.experts.w1": formats[4], "layers.1.mlp.experts.0.w1": formats[3], "w1": formats[3]}
    )
    assert config.format_of("model.layers.1.mlp.experts.0.w1") == formats[3]
    assert config.format_of("model.mlp.experts.w1") == formats[4]
    assert config.format_of("model.other_w1") == config.default
    assert config.format_of("w1") == formats[3]
