"""Budgets for mixtures of experts: what is measured of experts, and that those of a block share what they get."""

from collections import defaultdict

import pytest
import torch

import rosaq
from rosaq.calibrate import drawn_labels, site_gradients
from rosaq.checkpoint import read_config
from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.pipeline import quantize
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site_facts import SiteMeter
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
def test_gradients_of_an_expert_are_those_of_the_tokens_routed_to_it(name, dense):
    """Against autograd through all blocks at once, for the same drawn labels."""
    model, hidden, final = measured(dense[name])
    blocks, family = model.blocks, model.blocks.family
    got = [{}, {}]
    for part in site_gradients(blocks, model.block, *final, hidden, torch.Generator().manual_seed(7)):
        got[part.index][part.site.name] = part
    state, outputs, tokens = hidden.clone().requires_grad_(), [], []
    for index in range(2):
        state, out, inputs = blocks.forward_with_outputs(index, model.block(index), state)
        outputs.append(out)
        routed = [site for site in family.sites if site.expert is not None and site.name in inputs]
        tokens.append({linear: inputs[site.name].tokens for site in routed for linear in site.linears})
        for site in routed:
            assert torch.equal(got[index][site.name].x, inputs[site.name].x)
    logits = blocks.final_norm(state, final[0]) @ final[1].T
    labels = drawn_labels(logits.detach().softmax(-1).flatten(0, 1), torch.Generator().manual_seed(7))
    score = logits.flatten(0, 1).log_softmax(-1).gather(1, labels[:, None]).sum()
    for index in range(2):
        mine = {linear: slope for part in got[index].values() for linear, slope in part.slopes.items()}
        assert set(mine) == set(outputs[index]) <= set(family.linears)
        gradients = torch.autograd.grad(score, list(outputs[index].values()), retain_graph=True)
        for linear, gradient in zip(outputs[index], gradients, strict=True):
            if linear in tokens[index]:
                assert len(mine[linear]) == len(tokens[index][linear]) < IDS.numel()
            assert_same_function(mine[linear], gradient.flatten(0, -2))
    # every token goes to two experts
    assert sum(len(part.x) for part in got[0].values() if part.site.stage == "mlp_out") == 2 * IDS.numel()


def facts_of_first_block(model, hidden, final, recipe):
    """(its facts, {site: its gradients})."""
    meter, parts = SiteMeter(model.blocks, recipe, Rotations(), 0), {}
    for part in site_gradients(model.blocks, model.block, *final, hidden, torch.Generator().manual_seed(7)):
        if part.index == 0:
            meter.add(part)
            parts[part.site.name] = part
    return meter.facts(model.block(0), IDS.numel()), parts


@pytest.mark.parametrize("name", NAMES)
def test_second_moments_are_added_up_over_the_experts(name, dense):
    model, hidden, final = measured(dense[name])
    recipe = make_recipe("rosaq-gptq", target_bits=4.0, preset="fast")
    facts, parts = facts_of_first_block(model, hidden, final, recipe)
    sites = [site for site in model.blocks.family.sites if site.stage == "mlp_out"]
    inputs = model.blocks.inputs_of(0, model.block(0), hidden, sites).inputs
    assert len(sites) == 4
    assert set(facts) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    fact, total = facts["mlp_out"], 0.0
    gram = torch.zeros(inputs["mlp_out.0"].x.shape[1], inputs["mlp_out.0"].x.shape[1], dtype=torch.float64)
    for site in sites:
        x, cost = inputs[site.name].x.double(), parts[site.name].slopes[site.linears[0]].double().square().sum(1)
        gram += x.T * cost @ x
        total += float(cost.sum())
    assert fact.sensitivity == pytest.approx(total / IDS.numel())
    assert fact.energy == pytest.approx(float(torch.diagonal(gram).sum()) / total, rel=1e-5)
    values = torch.linalg.eigvalsh(gram / total).flip(0)
    assert fact.kept.tolist() == pytest.approx(values[: len(fact.kept)].tolist(), rel=1e-4)
    assert fact.num_weights == 4 * len(gram) * 64


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_met_and_experts_of_a_block_share_it(name, dense, tmp_path):
    made = quantize(dense[name], tmp_path / "out", target_bits=4.7, preset="fast", **SMALL)
    assert 4.4 < made.bits_per_weight <= 4.7
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
    facts, _ = facts_of_first_block(source, hidden, final, recipe)
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
