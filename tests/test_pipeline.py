"""The pipeline end to end on tiny models: what it writes, that it resumes bit-identically, what it refuses."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.calibrate import BlockModel
from rosaq.checkpoint import read_config
from rosaq.layout import unpack, zero_points
from rosaq.linear import RosaqLinear
from rosaq.pipeline import quantize
from rosaq.pipeline.probe import TOLERANCE
from rosaq.pipeline.source import DenseModel
from rosaq.recipes import PRESETS, RECIPES, make_recipe
from rosaq.specs import CalibrationSpec, TuneSpec
from tests.models import SMALL, TEXT, TUNED, byte_level_tokenizer, save_dense, tiny_llama, tiny_mistral, vandalise
from tests.tolerances import assert_same_function


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """{recipe: (output, result)} of every recipe."""
    root = tmp_path_factory.mktemp("made")
    salient = {"gptq": 2} | {recipe: 4 for recipe in RECIPES if recipe.startswith("rosaq")}
    with warnings.catch_warnings():  # of the bits that rosaq-layer takes
        warnings.simplefilter("ignore", UserWarning)
        return {r: (root / r, quantize(dense, root / r, recipe=r, salient=salient.get(r), **TUNED)) for r in RECIPES}


def logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([list(TEXT[0][:64].encode())]) % 256
    with torch.no_grad():
        return model.eval()(ids).logits, model


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_gives_a_checkpoint_that_transformers_runs(recipe, made, dense):
    output, result = made[recipe]
    got, model = logits(output)
    want, _ = logits(dense)
    linears = [m for m in model.modules() if isinstance(m, RosaqLinear)]
    assert len(linears) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert got.shape == want.shape
    similarity = torch.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    assert similarity > 0.6, f"{recipe}: {similarity}"  # 3 bits on random weights; a wrong rotation gives about 0
    assert result.bits_per_weight == pytest.approx(
        sum(m.bits_per_weight * m.in_features * m.out_features for m in linears)
        / sum(m.in_features * m.out_features for m in linears)
    )
    assert result.recipe == read_config(output).recipe == recipe
    assert len(result.layers) == 14
    assert {row["name"] for row in result.layers} == {n for n, m in model.named_modules() if isinstance(m, RosaqLinear)}
    if RECIPES[recipe].rotation.is_identity:
        assert result.rotation_error is None
    else:
        assert 0 <= result.rotation_error < TOLERANCE


def test_rotations_are_where_the_recipe_says(made):
    modules = dict(logits(made["rosaq-gptq"][0])[1].named_modules())
    block = "model.layers.1."
    assert modules[block + "self_attn.q_proj"].salient_index.tolist() == [0, 1, 2, 3]
    assert modules[block + "self_attn.o_proj"].salient_weight is None
    assert modules[block + "mlp.down_proj"].salient_weight is None
    assert modules[block + "mlp.down_proj"].rotation.shape == (1, 16, 16)
    modules = dict(logits(made["rosaq"][0])[1].named_modules())
    assert modules[block + "mlp.down_proj"].salient_basis.shape == (128, 4)
    assert modules[block + "mlp.down_proj"].rotation is None
    assert len(modules[block + "self_attn.o_proj"].salient_index) == 4
    assert modules[block + "input_layernorm"].weight.unique().tolist() == [1.0]


def test_codes_of_salient_columns_are_the_zero_point_or_half_a_step_below(made):
    tensors = load_file(made["rosaq-gptq"][0] / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj."
    zero = zero_points(tensors[prefix + "zeros"])
    kept = unpack(tensors[prefix + "qweight"], 3)[:, :4].float()
    assert torch.equal(kept, zero.floor()[:, :1].expand_as(kept))
    assert set((zero % 1).unique().tolist()) == {0.0, 0.5}


def test_the_layer_report_is_the_error_of_the_stored_weights(made):
    """More bits, less error; and the file beside the model says what the result says."""
    output, result = made["rosaq-gptq"]
    saved = json.loads((output / "rosaq_layers.json").read_text())
    assert saved["layers"] == result.layers
    assert all(row["sqnr_db"] > 5 and row["measured_on"] == "outputs" for row in saved["layers"])
    assert made["rtn"][1].layers[0]["measured_on"] == "weights"


def test_the_report_tells_what_tuning_and_importance_did(made):
    output, _ = made["rosaq-gptq"]
    report = json.loads((output / "rosaq_layers.json").read_text())
    assert 0 < report["divergence"][1] < report["divergence"][0]
    blocks = report["blocks"]
    assert len(blocks) == 2
    for block in blocks:
        before, after = block["tuned"]
        assert 0 < after < before
        assert 0 < block["importance"]["effective_share"] < 1
        assert sum(block["importance"]["histogram"]) == pytest.approx(1)
    gains = load_file(output / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    assert (gains != 1).any()
    blocks = json.loads((made["gptq"][0] / "rosaq_layers.json").read_text())["blocks"]
    assert blocks == [{"tuned": None, "importance": None, "expert_tokens": None}] * 2


def test_the_report_has_the_spectrum_with_and_without_sinks(made, tmp_path):
    """A model with a token, "0", whose vector is a hundred times longer than any other."""
    dense = tiny_llama(seed=4)
    with torch.no_grad():
        dense.model.embed_tokens.weight[byte_level_tokenizer()("0")["input_ids"][0]] *= 100
    model = save_dense(tmp_path / "dense", dense)
    text = [("a quick brown fox " * 5 + "0") * 40]
    quantize(model, tmp_path / "out", preset="fast", salient=4, **(SMALL | {"calibration": text}))
    spectrum = json.loads((tmp_path / "out" / "rosaq_layers.json").read_text())["spectrum"]
    assert 0.005 < spectrum["sink_share"] < 0.03  # one token in 91
    assert len(spectrum["all_tokens"]) == len(spectrum["without_sinks"]) == 64
    assert spectrum["all_tokens"] != spectrum["without_sinks"]
    for values in (spectrum["all_tokens"], spectrum["without_sinks"]):
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(64, rel=0.2)  # what a norm leaves of a token
    calm = json.loads((made["rosaq"][0] / "rosaq_layers.json").read_text())["spectrum"]
    assert calm["sink_share"] == 0
    assert calm["all_tokens"] == pytest.approx(calm["without_sinks"])


def test_presets_are_more_or_less_work(dense, tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "spec"}
    made = quantize(dense, tmp_path / "fast", preset="fast", salient=4, **small)
    blocks = json.loads((tmp_path / "fast" / "rosaq_layers.json").read_text())["blocks"]
    assert all(block["tuned"] is None for block in blocks)
    assert made.recipe == "rosaq-gptq"
    tuned = [make_recipe(preset=preset).tune for preset in PRESETS]
    steps = [(tune.steps, tune.model_steps) for tune in tuned]
    assert steps[0] == (0, 0) < steps[1] < steps[2]
    with pytest.raises(ValueError, match="preset: got 'slow', need one of fast, default, best"):
        quantize(dense, tmp_path / "slow", preset="slow", **small)


def test_importance_can_be_chosen_by_name_and_sequences_rolled(dense, made, tmp_path):
    rarity = quantize(dense, tmp_path / "rarity", recipe="gptq", salient=2, importance="rarity", **SMALL)
    plain = made["gptq"][1]
    assert [row["sqnr_db"] for row in rarity.layers] != [row["sqnr_db"] for row in plain.layers]
    rolled = SMALL | {"spec": CalibrationSpec(3, 48, 4, expansion=2)}
    seen = []
    real = BlockModel.embed

    def spy(self, embedding, ids):
        seen.append(ids)
        return real(self, embedding, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockModel, "embed", spy)
        quantize(dense, tmp_path / "rolled", recipe="gptq", **rolled)
    assert seen[0].shape == (6, 48)
    assert torch.equal(seen[0][3:], seen[0][:3].roll(24, 1))


def test_four_bits_lose_less_than_three(dense, made, tmp_path):
    four = quantize(dense, tmp_path / "four", bits=4, salient=4, **SMALL)
    three = made["rosaq-gptq"][1]
    assert four.bits_per_weight == pytest.approx(three.bits_per_weight + 1)
    for a, b in zip(four.layers, three.layers, strict=True):
        assert a["sqnr_db"] > b["sqnr_db"] + 3
    want, _ = logits(dense)
    errors = [float((logits(path)[0] - want).square().mean()) for path in (tmp_path / "four", made["rosaq-gptq"][0])]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("recipe", ["quarot", "rosaq", "rosaq-gptq"])
def test_without_rounding_the_rotated_checkpoint_is_the_model(recipe, dense, tmp_path, monkeypatch):
    """Swap the codes for the exact weights: what is left of the recipe is its rotations, and they must cancel."""
    import rosaq.pipeline.block as block

    exact = {}
    real = block._quantize_site

    def remember(site, task, *rest):
        exact[task.index, site.name] = {name: task.weights[f"{name}.weight"].clone() for name in site.linears}
        return real(site, task, *rest)

    monkeypatch.setattr(block, "_quantize_site", remember)
    # tuning makes up for the rounding, in the gains too: without rounding there is nothing to make up for
    monkeypatch.setitem(RECIPES, recipe, replace(RECIPES[recipe], tune=TuneSpec()))
    output = tmp_path / "out"
    quantize(dense, output, recipe=recipe, salient=4, **SMALL)
    want, _ = logits(dense)
    _, model = logits(output)
    for (index, _), linears in exact.items():
        for name, weight in linears.items():
            holder = model.model.layers[index].get_submodule(name)
            plain = torch.nn.Linear(holder.in_features, holder.out_features, bias=False)
            plain.weight.data = weight
            if holder.rotation is not None:
                rotation = torch.block_diag(*holder.rotation.float().expand(holder.in_features // 16, -1, -1))
                plain.weight.data = weight @ rotation.T
            model.model.layers[index].set_submodule(name, plain)
    with torch.no_grad():
        got = model(torch.tensor([list(TEXT[0][:64].encode())]) % 256).logits
    assert_same_function(got, want, stored_in=torch.float16)  # embedding and head are stored in 16 bits


def test_mistral_and_biases_go_through(tmp_path):
    for name, model in (
        ("mistral", tiny_mistral(sliding_window=16)),
        ("bias", tiny_llama(attention_bias=True, mlp_bias=True)),
        ("tied", tiny_llama(tie_word_embeddings=True)),
    ):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        source = save_dense(tmp_path / name, model)
        result = quantize(source, tmp_path / f"{name}-out", bits=4, salient=4, **SMALL)
        assert result.rotation_error < TOLERANCE
        got, want = logits(tmp_path / f"{name}-out")[0], logits(source)[0]
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.85, name


@pytest.mark.parametrize("recipe", ["rtn", "rosaq"])
def test_a_stored_head_counts_whatever_the_config_says_of_tying(recipe, tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama(tie_word_embeddings=True))
    vandalise(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert DenseModel(source).is_tied  # the same values twice are tied
    vandalise(source, lambda tensors: tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].flip(0)))
    quantize(source, tmp_path / "out", recipe=recipe, bits=4, **SMALL)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    got, want = logits(tmp_path / "out")[0], logits(source)[0]
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.85


def test_two_runs_are_bit_identical_and_the_seed_matters(dense, made, tmp_path):
    first = load_file(made["rosaq-gptq"][0] / "model.safetensors")
    quantize(dense, tmp_path / "again", salient=4, **TUNED)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = TUNED | {"spec": CalibrationSpec(6, 48, 4, seed=1)}
    quantize(dense, tmp_path / "other", salient=4, **other)
    changed = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(first["model.embed_tokens.weight"], changed["model.embed_tokens.weight"])


class Killed(BaseException):
    """As hard a stop as a test can make inside one process."""


@pytest.mark.parametrize(
    ("recipe", "stop_after"),
    [("rosaq-gptq", step) for step in (("axes", 1), ("blocks", 0), ("blocks", 1), ("tuning", 2), ("write", 2))]
    + [("rosaq", ("blocks", 0))],  # an online basis
)
def test_a_killed_run_resumes_bit_identically(recipe, stop_after, dense, made, tmp_path):
    output = tmp_path / "out"
    request = TUNED | {"recipe": recipe, "salient": 4}

    def kill(event):
        if (event.stage, event.block) == stop_after:
            raise Killed

    with pytest.raises(Killed):
        quantize(dense, output, progress=kill, **request)
    assert not output.exists()
    if stop_after[0] == "axes":  # no block finished: nothing to resume, nothing left behind
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(ValueError, match="output: got an unfinished run"):
        quantize(dense, output, **request)
    with pytest.raises(ValueError, match="resume: got another request"):
        quantize(dense, output, resume=True, **(request | {"salient": 2}))
    seen = []
    quantize(dense, output, resume=True, progress=lambda e: seen.append((e.stage, e.block)), **request)
    assert ("axes", 0) not in seen
    undisturbed = made[recipe][0]
    for path in sorted(undisturbed.iterdir()):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_goes_on_only_where_its_products_are_the_same(dense, tmp_path, monkeypatch):
    """A machine without bfloat16 instructions would continue in float32, and end with other codes."""

    def kill(event):
        if (event.stage, event.block) == ("blocks", 0):
            raise Killed

    request = SMALL | {"preset": "fast", "salient": 4}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    with pytest.raises(Killed):
        quantize(dense, tmp_path / "out", progress=kill, **request)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    with pytest.raises(ValueError, match="got another request.*'products': 'float32'.*need.*'products': 'bfloat16'"):
        quantize(dense, tmp_path / "out", resume=True, **request)


def test_force_replaces_only_at_the_end(dense, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    (output / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"output: got .*out, which exists and is not empty"):
        quantize(dense, output, recipe="rtn", **SMALL)

    def kill(_event):
        raise Killed

    with pytest.raises(Killed):
        quantize(dense, output, recipe="rtn", force=True, progress=kill, **SMALL)
    assert (output / "precious.txt").read_text() == "mine"
    quantize(dense, output, recipe="rtn", force=True, **SMALL)
    assert not (output / "precious.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_public_function_is_the_pipeline(dense, tmp_path):
    result = rosaq.quantize(dense, tmp_path / "out", recipe="rtn", **SMALL)
    assert result.to_dict()["bits_per_weight"] == result.bits_per_weight
    assert result.peak_memory_bytes > 0


def test_passes_in_bfloat16_round_products_only(dense, monkeypatch):
    source = DenseModel(dense)
    weights, hidden = source.block(0), torch.randn(2, 16, source.blocks.sizes.hidden)
    exact = source.blocks.run(0, weights, hidden)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert source.blocks.in_bf16() is source.blocks  # without instructions for it
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    rounded = source.blocks.in_bf16().run(0, weights, hidden)
    error = float((rounded - exact).norm() / exact.norm())
    assert rounded.dtype == torch.float32  # as the residual stream stays
    assert 0 < error < 2**-7
    assert torch.equal(source.blocks.run(0, weights, hidden), exact)


def test_tuning_that_makes_a_block_worse_is_not_kept(dense, tmp_path, monkeypatch):
    recipe = make_recipe("rosaq-gptq", salient=4, group_size=32)
    alone, tuned = (replace(recipe, tune=replace(recipe.tune, steps=steps, model_steps=0)) for steps in (0, 4))

    @torch.no_grad()
    def worsen(_model, _index, block, *_rest):
        for linear in block.linears.values():
            linear.stretch += 1
        return 1.0, 2.0

    quantize(dense, tmp_path / "alone", recipe=alone, **SMALL)
    monkeypatch.setattr("rosaq.pipeline.block.tune_block", worsen)
    with pytest.warns(UserWarning, match="model.layers.1: tuning raised its loss from 1 to 2: it stays as it was"):
        quantize(dense, tmp_path / "tuned", recipe=tuned, **SMALL)
    layers = json.loads((tmp_path / "tuned" / "rosaq_layers.json").read_text())
    assert [block["tuned"] for block in layers["blocks"]] == [[1.0, 1.0]] * 2
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "alone"))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_tuning_that_makes_the_model_worse_is_not_kept(dense, tmp_path, monkeypatch):
    recipe = make_recipe("rosaq-gptq", salient=4, group_size=32)
    untuned, tuned = (replace(recipe, tune=replace(recipe.tune, steps=0, model_steps=steps)) for steps in (0, 4))

    @torch.no_grad()
    def worsen(_model, blocks, *_rest):
        for linear in blocks[0].linears.values():
            linear.stretch += 1
        return 1.0, 2.0

    quantize(dense, tmp_path / "untuned", recipe=untuned, **SMALL)
    monkeypatch.setattr("rosaq.pipeline.whole_model.tune_model", worsen)
    with pytest.warns(
        UserWarning, match="tuning the whole model raised its divergence from 1 to 2: it stays as it was"
    ):
        quantize(dense, tmp_path / "tuned", recipe=tuned, **SMALL)
    assert json.loads((tmp_path / "tuned" / "rosaq_layers.json").read_text())["divergence"] == [1.0, 1.0]
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "untuned"))
    assert [name for name in wanted | found if not torch.equal(found[name], wanted[name])] == []
