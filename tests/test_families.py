"""Every family: folding and rotating change nothing, and what is stored is what transformers runs."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.calibrate import BlockModel
from rosaq.experts import Experts, replace_fused
from rosaq.integrations.transformers import RosaqConfig
from rosaq.linear import RosaqLinear
from rosaq.models import FAMILIES
from rosaq.pipeline import quantize
from rosaq.pipeline.block import online
from rosaq.pipeline.probe import TOLERANCE
from rosaq.pipeline.request import fit_to_family
from rosaq.pipeline.rotations import choose_rotations
from rosaq.pipeline.source import DenseModel
from rosaq.recipes import RECIPES, make_recipe
from rosaq.rotation import fold_norms, rotate_block, rotate_rows, unit_gain
from tests.families import CHANGES, save_family, tiny_family
from tests.models import SMALL, TEXT, TUNED
from tests.tolerances import assert_as_good_as, assert_same_function

MIXTURES = ("mixtral", "qwen3_moe")
POST_NORMED = ("gemma3_text",)
INPUT_IDS = torch.tensor([list(TEXT[0][:64].encode())]) % 256

# tiny models calibrate on few tokens, and Gemma's recipe is fitted to it: both are told, and tested below
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*got fewer tokens than their:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*got a recipe that rotates the residual stream:UserWarning"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{family: directory of its tiny model in float16}."""
    root = tmp_path_factory.mktemp("dense")
    return {name: save_family(root / name, tiny_family(name)) for name in CHANGES}


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """{family: (directory, result)} of the default recipe."""
    root, results = tmp_path_factory.mktemp("made"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, source in dense.items():
            results[name] = (root / name, quantize(source, root / name, bits=4, salient=2, **TUNED))
    return results


def load(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


@torch.no_grad()
def logits_of(model):
    return model(INPUT_IDS).logits


def test_every_family_of_the_tables_is_tested():
    assert set(CHANGES) == set(FAMILIES)


@pytest.mark.parametrize("recipe", ["rosaq", "rosaq-gptq"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_folded_and_rotated_model_is_the_model(name, recipe, dense):
    """In transformers' own code for the whole model, every tensor of it exchanged for the rotated one."""
    source = DenseModel(dense[name])
    family, sizes = source.blocks.family, source.blocks.sizes
    chosen = fit_to_family(make_recipe(recipe, salient=2), family)
    hidden = source.blocks.embed(source.get(source.embedding_name), INPUT_IDS)
    rotations = choose_rotations(source, chosen, [hidden], [torch.ones_like(INPUT_IDS)], 0, lambda _: None)
    assert (rotations.residual is None) == (name in POST_NORMED)
    model = load(dense[name])
    want = logits_of(model)
    replace_fused(model)
    state = {n: t.clone() for n, t in model.state_dict().items() if t.device.type != "meta"}
    for index in range(sizes.num_blocks):
        of_block = rotations.of_block(index)
        folded = source.block(index) if rotations.residual is None else fold_norms(source.block(index), family)
        turned = online(rotate_block(folded, of_block, family, sizes), family, of_block)
        state |= {family.block_prefix(index) + n: t for n, t in turned.items()}
    if rotations.residual is not None:
        gain, rows, head = (source.get(n) for n in (source.final_norm_name, source.embedding_name, source.head_name))
        state[source.embedding_name] = rotate_rows(rows, rotations.residual)
        state[source.final_norm_name] = unit_gain(gain, family)
        state["lm_head.weight"] = rotate_rows(head, rotations.residual, gain + family.gain_offset)
    moved = [n for n, t in model.state_dict().items() if t.device.type != "meta" and not torch.equal(t, state[n])]
    assert f"model.layers.1.{family.value}.weight" in moved
    model.load_state_dict(state, strict=True, assign=True)
    assert_same_function(logits_of(model), want)


@pytest.mark.parametrize("name", CHANGES)
def test_the_loaded_model_is_the_dense_model_of_the_stored_tensors(name, made, dense, tmp_path):
    output, result = made[name]
    model = load(output)
    assert result.rotation_error < TOLERANCE
    linears = {n for n, m in model.named_modules() if isinstance(m, RosaqLinear)}
    assert len(linears) == {"mixtral": 32, "qwen3_moe": 32}.get(name, 14)
    assert {layer["name"] for layer in result.layers} == linears
    assert [n for n, m in model.named_modules() if type(m) is torch.nn.Linear] == ["lm_head"]
    assert rosaq.verify(output).is_sound
    for block in json.loads((output / "rosaq_layers.json").read_text())["blocks"]:
        before, after = block["tuned"]
        assert 0 < after <= before  # equal where it was left alone: a mixture's router may send tokens elsewhere
    # through transformers' own 3-D experts, for a mixture
    rosaq.convert(output, tmp_path / "plain", to="dense", dtype="float32")
    plain = load(tmp_path / "plain")
    assert not any(isinstance(m, (RosaqLinear, Experts)) for m in plain.modules())
    assert_same_function(logits_of(model), logits_of(plain))
    similarity = torch.cosine_similarity(logits_of(model).flatten(), logits_of(load(dense[name])).flatten(), dim=0)
    assert similarity > 0.9, similarity


@pytest.mark.parametrize("name", CHANGES)
def test_the_loaded_model_generates(name, made):
    model = load(made[name][0])
    tokens = model.generate(INPUT_IDS[:, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 14)
    without_cache = model.generate(
        INPUT_IDS[:, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False
    )
    assert torch.equal(tokens, without_cache)


# Not for mixtures: a router that rounds differently sends a token elsewhere.
@pytest.mark.parametrize(("name", "dtype"), [("qwen2", torch.float16), ("gemma3_text", torch.bfloat16)])
def test_lower_precision_loses_no_more_than_plain_linears(name, dtype, made):
    got = logits_of(load(made[name][0], dtype))
    exact = load(made[name][0]).dequantize(torch.float64).to(torch.float64)
    plain = load(made[name][0]).dequantize(dtype).to(dtype)
    assert_as_good_as(got, logits_of(plain), logits_of(exact))


@pytest.mark.parametrize("name", CHANGES)
def test_saving_again_gives_the_same_tensors(name, made, tmp_path):
    load(made[name][0], torch.float16).save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (made[name][0], tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3_text", "qwen3_moe"])
def test_biases_and_norms_of_q_and_k_are_kept_exactly(name, made, dense):
    before, after = (load_file(d / "model.safetensors") for d in (dense[name], made[name][0]))
    kept = [k for k in before if k.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias"))]
    assert len(kept) == 4
    assert all(torch.equal(before[key], after[key]) for key in kept)


# --- families whose residual stream cannot be rotated ----------------------------------------------------------------


@pytest.mark.parametrize("name", POST_NORMED)
def test_what_cannot_be_folded_is_made_online_and_told(name, dense, tmp_path):
    with pytest.warns(
        UserWarning, match=r"gemma3_text: got a recipe that rotates the residual stream \('pca-fitted'\)"
    ):
        quantize(dense[name], tmp_path / "out", salient=2, **SMALL)
    before, after = (load_file(d / "model.safetensors") for d in (dense[name], tmp_path / "out"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert "lm_head.weight" not in after
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    model = load(tmp_path / "out")
    attention = model.model.layers[1].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert linear.salient_basis.shape == (64, 2)
        assert linear.rotation.shape == (1, 16, 16)
        assert torch.equal(linear.salient_basis, attention.q_proj.salient_basis)  # one launch for all three
    gains = [f"model.layers.1.{norm}.weight" for norm in ("input_layernorm", "pre_feedforward_layernorm")]
    assert all((before[gain] != after[gain]).any() for gain in gains)  # tuned
    assert torch.equal(*(t["model.layers.1.post_attention_layernorm.weight"] for t in (before, after)))


def test_the_paper_recipe_keeps_principal_directions_online_where_nothing_folds():
    for name in FAMILIES:
        family = FAMILIES[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fitted = fit_to_family(RECIPES["rosaq"], family)
        if name in POST_NORMED:
            assert fitted.rotation.residual == "none"
            assert fitted.salient.basis == ("residual", "hidden")
        else:
            assert fitted == RECIPES["rosaq"]
        assert fit_to_family(RECIPES["gptq"], family) == RECIPES["gptq"]


# --- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_give_the_same_checkpoint(name, dense, tmp_path):
    fused = save_family(tmp_path / "fused", load(dense[name]), save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(fused / "model.safetensors")
    for source in (dense[name], fused):
        quantize(source, tmp_path / f"{source.name}-out", recipe="gptq", **SMALL)
    one, other = (load_file(tmp_path / f"{d.name}-out" / "model.safetensors") for d in (dense[name], fused))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_moments_of_an_expert_are_those_of_the_tokens_routed_to_it(name, dense):
    source = DenseModel(dense[name])
    hidden = source.blocks.embed(source.get(source.embedding_name), INPUT_IDS)
    sites = [site for site in source.blocks.family.sites if site.expert is not None]
    passed = source.blocks.inputs_of(0, source.block(0), hidden, sites, stop=False)
    found = passed.inputs
    experts = load(dense[name]).model.layers[0].mlp
    seen = {}
    experts.experts.register_forward_pre_hook(lambda _module, args: seen.update(x=args[0], chosen=args[1]))
    model = load(dense[name])
    model.model.layers[0].mlp = experts
    states = model(INPUT_IDS, output_hidden_states=True).hidden_states
    assert_same_function(passed.output, states[1])
    for expert in range(4):
        tokens = torch.where((seen["chosen"] == expert).any(1))[0]
        assert torch.equal(found[f"mlp_in.{expert}"].tokens, tokens)
        assert_same_function(found[f"mlp_in.{expert}"].x, seen["x"][tokens])
        gate, up = (seen["x"][tokens] @ experts.experts.gate_up_proj[expert].T).chunk(2, -1)
        assert_same_function(found[f"mlp_out.{expert}"].x, torch.nn.functional.silu(gate) * up)
    everything = source.blocks.inputs_of(0, source.block(0), hidden, sites, route_all=True).inputs
    assert all(given.x.shape[0] == INPUT_IDS.numel() for given in everything.values())
    assert len(everything) == 8


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_rounded_while_a_dense_checkpoint_loads(name, dense, tmp_path):
    config = RosaqConfig(4, 32)
    model = AutoModelForCausalLM.from_pretrained(dense[name], dtype=torch.float16, quantization_config=config)
    assert sum(isinstance(module, RosaqLinear) for module in model.modules()) == 32
    model.save_pretrained(tmp_path / "saved")
    assert rosaq.verify(tmp_path / "saved").is_sound
    quantize(dense[name], tmp_path / "rtn", recipe="rtn", bits=4, **SMALL)
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("saved", "rtn"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    fused = save_family(tmp_path / "fused", load(dense[name]), save_original_format=False)
    with pytest.raises(ValueError, match=r"experts\.0\..*: got no such tensor in the checkpoint, need it"):
        AutoModelForCausalLM.from_pretrained(fused, quantization_config=RosaqConfig(4, 32))


def test_the_router_stays_in_16_bits_and_reads_the_rotated_stream(made, dense):
    for name in MIXTURES:
        model = load(made[name][0])
        gate, before = model.model.layers[1].mlp.gate, load(dense[name]).model.layers[1].mlp.gate
        assert gate.weight.shape == before.weight.shape
        assert not torch.equal(gate.weight, before.weight)
        saved = load_file(made[name][0] / "model.safetensors")["model.layers.1.mlp.gate.weight"]
        assert saved.dtype == torch.float16


@pytest.mark.filterwarnings("default:.*got fewer tokens than their:UserWarning")
def test_experts_that_saw_too_few_tokens_are_told_and_counted(tmp_path):
    """Five routers' rows of which always two are positive: the fifth expert is never chosen."""
    model = tiny_family("mixtral", num_local_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1], weight[3], weight[4] = -weight[0], -weight[2], 0
    source = save_family(tmp_path / "dense", model)
    with pytest.warns(
        UserWarning, match=r"model\.layers\.1: got fewer tokens than their 128 input .* 4 \(0\); 1 of"
    ) as got:
        result = quantize(source, tmp_path / "out", recipe="gptq", bits=4, **SMALL)
    assert len([w for w in got if "fewer tokens" in str(w.message)]) == 2  # once a block
    blocks = json.loads((tmp_path / "out" / "rosaq_layers.json").read_text())["blocks"]
    for block in blocks:
        assert block["expert_tokens"][4] == 0
        assert sum(block["expert_tokens"]) == 2 * 6 * 48
    # measured on every token, so it is quantised like the others: with error feedback, not blindly
    rows = {row["name"]: row for row in result.layers}
    assert all(rows[f"model.layers.0.mlp.experts.4.{w}"]["measured_on"] == "outputs" for w in ("w1", "w2", "w3"))
    assert rows["model.layers.0.mlp.experts.4.w1"]["sqnr_db"] > 15


# --- the worked example of the documentation -------------------------------------------------------------------------


def test_the_example_of_the_documentation_works(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "new_family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.splitlines()) < 40
    monkeypatch.setattr("rosaq.models.FAMILIES", dict(FAMILIES))
    monkeypatch.setattr("rosaq.models.tables.FAMILIES", rosaq.models.FAMILIES)
    exec(compile(code, "docs/new_family.md", "exec"), {})
    monkeypatch.setitem(CHANGES, "olmo2", {})
    source = save_family(tmp_path / "dense", tiny_family("olmo2"))
    result = quantize(source, tmp_path / "out", bits=4, salient=2, **SMALL)
    assert result.rotation_error < TOLERANCE
    rosaq.convert(tmp_path / "out", tmp_path / "plain", to="dense", dtype="float32")
    got, plain, want = (logits_of(load(d)) for d in (tmp_path / "out", tmp_path / "plain", source))
    assert_same_function(got, plain)
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.9


# --- refusals --------------------------------------------------------------------------------------------------------


def test_blocks_without_the_linears_of_the_table_are_refused(tmp_path):
    source = save_family(tmp_path / "dense", tiny_family("qwen3_moe", mlp_only_layers=[1]))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1: got a block without .*experts.* 'qwen3_moe' in every block"
    ):
        quantize(source, tmp_path / "out", **SMALL)


def test_a_table_that_is_wrong_about_norms_is_found_out(dense, tmp_path, monkeypatch):
    for wrong in ({"is_post_normed": False}, {"is_post_normed": False, "gain_offset": 0.0}):
        monkeypatch.setitem(FAMILIES, "gemma3_text", replace(FAMILIES["gemma3_text"], **wrong))
        with pytest.raises(ValueError, match="does not fit its family's table"):
            quantize(dense["gemma3_text"], tmp_path / "out", recipe="quarot", force=True, **SMALL)  # over its rotations


@pytest.mark.parametrize(("family", "recipe"), [("llama", "gptq"), ("gemma3_text", "quarot")])
def test_a_table_that_is_wrong_about_inputs_is_found_out(dense, tmp_path, monkeypatch, family, recipe):
    """Where no rotation is folded, results are those of the dense model whichever second moments a linear gets."""
    table = FAMILIES[family]
    attention, mlp = (next(site for site in table.sites if site.name == name) for name in ("attn_in", "mlp_in"))
    joined = replace(attention, linears=(*attention.linears, *mlp.linears))
    sites = tuple(joined if site is attention else site for site in table.sites if site is not mlp)
    monkeypatch.setitem(FAMILIES, family, replace(table, sites=sites))
    with pytest.raises(ValueError, match=r"attn_in: got \['mlp.gate_proj', 'mlp.up_proj'\], which do not read what"):
        quantize(dense[family], tmp_path / "out", recipe=recipe, **SMALL)


def test_a_model_that_changes_its_embeddings_is_refused(tmp_path, monkeypatch):
    """Granite multiplies them after the embedding module: blocks would be run on the wrong stream without notice."""
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    monkeypatch.setitem(CHANGES, "granite", {"embedding_multiplier": 2.0})
    source = save_family(tmp_path / "dense", tiny_family("granite"))
    with pytest.raises(ValueError, match="granite: got embeddings that the model changes before its first block"):
        quantize(source, tmp_path / "out", recipe="gptq", **SMALL)


def test_a_computed_buffer_without_a_value_is_refused(dense, monkeypatch):
    monkeypatch.setattr(
        "transformers.models.gemma3.modeling_gemma3.Gemma3PreTrainedModel._init_weights", lambda *_: None
    )
    with pytest.raises(ValueError, match=r"embed_scale: got a buffer that its model does not compute"):
        BlockModel(dense["gemma3_text"])
