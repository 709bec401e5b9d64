"""A quantised output head: made like any site that reads the residual stream, last, in parts, and told as it is."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import rosaq.pipeline.head as head_module
from rosaq.checkpoint import WeightReader, bits_per_weight, linear_sizes, read_config, total_bytes
from rosaq.layout import dense_weight
from rosaq.pipeline import quantize
from rosaq.pipeline.request import check_formats
from rosaq.pipeline.source import DenseModel
from rosaq.quantizers import quantize_weight
from rosaq.recipes import RECIPES, make_recipe
from rosaq.rotation import rotate_blocks
from rosaq.sharding import allowed_sizes
from rosaq.specs import QuantSpec
from tests.families import save_family, tiny_family
from tests.models import SMALL, TUNED, save_dense, tiny_llama
from tests.peak import PeakMemory
from tests.tolerances import FLOORS, worst_column_error

VOCAB = 272  # more rows than are quantised together, and cut between two ranks


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{name: directory}: a Llama with random gains, the same with tied embeddings, a family that norms its writers."""
    root, changes = tmp_path_factory.mktemp("dense"), {"vocab_size": VOCAB}
    models = {
        "untied": tiny_family("llama", **changes),
        "tied": tiny_family("llama", tie_word_embeddings=True, **changes),
        "post-normed": tiny_family("gemma3_text", **changes),
    }
    return {name: save_family(root / name, model) for name, model in models.items()}


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """{recipe: (directory, result)} with a head of 4 bits beside blocks of 3."""
    root = tmp_path_factory.mktemp("made")
    wanted = {"rtn": {}, "gptq": {"salient": 2}, "rosaq-basis": {"salient": 4}, "rosaq-layer": {"salient": 4}}
    wanted |= {"rosaq-gptq": {"salient": 4} | TUNED}
    with pytest.warns(UserWarning, match="dense rotations"):
        return {
            recipe: (
                root / recipe,
                quantize(dense["untied"], root / recipe, recipe=recipe, head_bits=4, **SMALL | more),
            )
            for recipe, more in wanted.items()
        }


def head_of(directory):
    """(the head's stored tensors by their last name, its format)."""
    tensors = load_file(directory / "model.safetensors")
    own = {n.removeprefix("lm_head."): t for n, t in tensors.items() if n.startswith("lm_head.")}
    return own, read_config(directory).format_of("lm_head")


def dense_head(source):
    """What a head that reads the normed, not rotated stream does to the unit vectors: the gain is the head's here."""
    model = DenseModel(source)
    return model.get(model.head_name) * (model.get(model.final_norm_name) + model.blocks.family.gain_offset)


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "rosaq-basis", "rosaq-layer", "rosaq-gptq"])
def test_the_stored_head_is_the_dense_head(recipe, made, dense):
    """Up to its rounding, through rotation and norm; a wrong rotation or a gain left out is an error of order 1."""
    directory, result = made[recipe]
    tensors, fmt = head_of(directory)
    stored = load_file(directory / "model.safetensors")
    weight = dense_weight(tensors, fmt) * stored["model.norm.weight"].float()
    if RECIPES[recipe].rotation.folds_residual:  # the rotation of the stream is what became of the embedding
        embedding = DenseModel(dense["untied"]).get("model.embed_tokens.weight").double()
        rotation = torch.linalg.lstsq(embedding, stored["model.embed_tokens.weight"].double()).solution
        weight = weight @ rotation.T.float()
    want = dense_head(dense["untied"])
    error = float((weight - want).norm() / want.norm())
    assert 0 < error < 0.2
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert result.layers[-1]["name"] == "lm_head"


def test_the_head_is_quantised_by_the_recipe_on_the_finished_stream(dense, tmp_path):
    """GPTQ with the second moments of what transformers hands the head of the checkpoint, with energetic channels."""
    from transformers import AutoModelForCausalLM

    quantize(dense["untied"], tmp_path / "out", recipe="gptq", salient=2, head_bits=3, **SMALL)
    tensors, fmt = head_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(calibration_ids(dense["untied"]))
    gram = seen[0].double().T @ seen[0].double() / len(seen[0])
    assert tensors["salient_index"].tolist() == torch.topk(torch.diagonal(gram), 2).indices.sort().values.tolist()
    w = DenseModel(dense["untied"]).get("lm_head.weight")
    own = quantize_weight(w, gram, QuantSpec(3, 32, method="gptq"), tensors["salient_index"].long())
    nearest = quantize_weight(w, None, QuantSpec(3, 32, method="rtn", clip=False), tensors["salient_index"].long())
    losses = [loss(dense_weight(t, fmt), w, gram) for t in (tensors, own, nearest)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bfloat16 passes move the second moments a little
    assert losses[0] < 0.7 * losses[2]


def loss(got, want, gram):
    error = (got - want).double()
    return float(((error @ gram) * error).sum())


def calibration_ids(source):
    from rosaq.pipeline.request import calibration_windows

    return calibration_windows(DenseModel(source), RECIPES["gptq"], SMALL["calibration"], SMALL["spec"])


def test_directions_of_the_head_are_those_of_a_site_that_reads_the_stream(made, dense, tmp_path):
    assert head_of(made["rosaq-gptq"][0])[0]["salient_index"].tolist() == [0, 1, 2, 3]
    assert head_of(made["rosaq-basis"][0])[0]["salient_basis"].shape == (64, 4)
    assert head_of(made["rosaq-layer"][0])[0]["rotation"].shape == (1, 64, 64)
    assert head_of(made["gptq"][0])[1].num_salient == 2
    assert head_of(made["rtn"][0])[1].num_salient == 0
    with pytest.warns(UserWarning, match="rotates the residual stream"):  # made online at the head as at other sites
        quantize(dense["post-normed"], tmp_path / "out", salient=2, head_bits=4, preset="fast", **SMALL)
    tensors, fmt = head_of(tmp_path / "out")
    assert tensors["salient_basis"].shape == (64, 2)
    assert (fmt.rotation_blocks, fmt.rotation_size) == (1, 16)
    want = DenseModel(dense["post-normed"]).get("model.embed_tokens.weight")
    error = dense_weight(tensors, fmt) - want
    assert float(error.norm() / want.norm()) < 0.2
    kept = rotate_blocks(error, tensors["rotation"].float()) @ tensors["salient_basis"].float()
    assert float(kept.norm() / error.norm()) < FLOORS[torch.bfloat16]  # exact on its own directions


def test_three_bits_are_smaller_and_worse_than_four(made, dense, tmp_path):
    three = quantize(dense["untied"], tmp_path / "three", salient=4, head_bits=3, **TUNED)
    directory, four = made["rosaq-gptq"]
    assert four.layers[:-1] == three.layers[:-1]  # the head is last: nothing before it knows its width
    assert four.layers[-1]["sqnr_db"] > three.layers[-1]["sqnr_db"] + 3
    assert four.bytes - three.bytes == VOCAB * 64 // 8
    blocks = [load_file(d / "model.safetensors") for d in (directory, tmp_path / "three")]
    assert all(torch.equal(blocks[0][n], blocks[1][n]) for n in blocks[0] if not n.startswith("lm_head."))


# --- in parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "rosaq-basis", "rosaq-gptq"])
@pytest.mark.parametrize("rows", [8, 120, VOCAB])
def test_parts_give_what_the_whole_gives(recipe, rows, made, dense, tmp_path, monkeypatch):
    """Rows do not know of each other. Products of other shapes differ in their last bits, so single codes may flip."""
    monkeypatch.setattr(head_module, "rows_at_once", lambda _model: rows)
    more = {"rosaq-gptq": {"salient": 4} | TUNED, "rosaq-basis": {"salient": 4}, "gptq": {"salient": 2}}.get(recipe, {})
    seen = []
    result = quantize(
        dense["untied"],
        tmp_path / "out",
        recipe=recipe,
        head_bits=4,
        progress=lambda e: seen.append((e.block, e.num_blocks)) if e.stage == "head" else None,
        **SMALL | more,
    )
    count = math.ceil(VOCAB / rows)
    assert seen == [(part, count) for part in range(count)]
    got, want = (head_of(directory) for directory in (tmp_path / "out", made[recipe][0]))
    assert got[1] == want[1]
    assert got[0].keys() == want[0].keys()
    assert all(got[0][name].shape == tensor.shape for name, tensor in want[0].items())
    for name in ("salient_index", "salient_basis"):
        assert name not in want[0] or torch.equal(got[0][name], want[0][name])
    assert worst_column_error(*(dense_weight(*each).T.double() for each in (got, want))) <= FLOORS[torch.bfloat16]
    assert result.layers[-1]["sqnr_db"] == pytest.approx(made[recipe][1].layers[-1]["sqnr_db"], abs=0.05)


def test_a_part_is_no_larger_than_the_widest_site_of_a_block(dense):
    assert head_module.rows_at_once(DenseModel(dense["untied"]).blocks) == 2 * 128  # gate and up


def test_the_report_adds_up_the_parts(made, dense):
    """Against the error of the whole head, measured on the weights because there are no tokens."""
    directory, result = made["rtn"]
    want = DenseModel(dense["untied"]).get("lm_head.weight")
    error = dense_weight(*head_of(directory)) - want
    row = result.layers[-1]
    assert row["measured_on"] == "weights"
    assert row["sqnr_db"] == pytest.approx(20 * math.log10(float(want.norm() / error.norm())), rel=1e-6)


def test_a_wide_head_takes_no_more_memory_than_one_that_is_left_alone(tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama(vocab_size=8192))
    peaks = {}
    for bits in (16, 4):
        with PeakMemory() as memory:
            quantize(source, tmp_path / f"out{bits}", preset="fast", salient=2, head_bits=bits, **SMALL)
        peaks[bits] = memory.peak
    assert peaks[4] <= peaks[16]


# --- what is written about it ----------------------------------------------------------------------------------------


def test_config_report_and_sizes_say_what_there_is(made):
    for directory, result in made.values():
        config = read_config(directory)
        assert config.modules_to_not_convert == ()
        assert config.modules["lm_head"] == config.format_of("lm_head")
        assert (config.modules["lm_head"].bits, config.default.bits) == (4, 3)
        sizes = linear_sizes(config, WeightReader(directory))
        assert sizes.pop("lm_head") == (VOCAB, 64)
        report = json.loads((directory / "rosaq_layers.json").read_text())
        assert report["layers"] == result.layers
        assert report["recipe"]["head_bits"] == 4
        assert [row["name"] for row in result.layers].count("lm_head") == 1
        head = head_of(directory)[0]
        assert result.head_bits_per_weight == result.layers[-1]["bits_per_weight"]
        assert result.head_bits_per_weight == 8 * sum(t.nbytes for t in head.values()) / (VOCAB * 64)
        numels = {name: n * k for name, (n, k) in sizes.items()}
        blocks = sum(row["bits_per_weight"] * numels[row["name"]] for row in result.layers[:-1]) / sum(numels.values())
        assert result.bits_per_weight == bits_per_weight(directory) == pytest.approx(blocks)
        assert result.bytes == total_bytes(directory)


def test_ranks_are_those_that_cut_the_head_too(dense, tmp_path):
    cut = {"recipe": "rtn", "head_bits": 4}
    quantize(dense["untied"], tmp_path / "even", **cut, **SMALL)
    assert read_config(tmp_path / "even").tp_sizes == (1, 2)
    source = save_dense(tmp_path / "dense", tiny_llama())  # 264 rows: no two ranks get a multiple of 8
    quantize(source, tmp_path / "odd", **cut, **SMALL)
    assert read_config(tmp_path / "odd").tp_sizes == (1,)
    assert 2 not in allowed_sizes([(head_of(tmp_path / "odd")[1], 64, 264, "out")])
    quantize(source, tmp_path / "left", recipe="rtn", **SMALL)
    assert read_config(tmp_path / "left").tp_sizes == (1, 2)


def test_a_head_that_is_left_alone_is_left_alone(dense, tmp_path):
    for name, more in (("default", {}), ("told", {"head_bits": 16})):
        result = quantize(dense["untied"], tmp_path / name, recipe="rtn", **more, **SMALL)
        assert result.head_bits_per_weight is None
        assert read_config(tmp_path / name).modules_to_not_convert == ("lm_head",)
        assert set(head_of(tmp_path / name)[0]) == {"weight"}
    assert len(result.layers) == 14


@pytest.mark.parametrize("recipe", ["rtn", "rosaq-gptq"])
def test_the_embedding_of_a_tied_model_stays_and_the_head_is_untied(recipe, dense, tmp_path, recwarn):
    result = quantize(dense["tied"], tmp_path / "out", recipe=recipe, head_bits=4, preset="fast", **SMALL)
    told = [w for w in recwarn if "codes come on top" in str(w.message)]
    assert len(told) == (recipe == "rtn")  # a rotation unties them anyway
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors, source = load_file(tmp_path / "out" / "model.safetensors"), DenseModel(dense["tied"])
    embedding = tensors["model.embed_tokens.weight"].float()
    assert embedding.shape == (VOCAB, 64)
    assert "lm_head.weight" not in tensors
    assert result.head_bits_per_weight < 6
    if recipe == "rtn":
        assert torch.equal(embedding, source.get("model.embed_tokens.weight"))
        error = dense_weight(*head_of(tmp_path / "out")) - embedding
        assert 0 < float(error.norm() / embedding.norm()) < 0.2


@pytest.mark.parametrize("target_bits", [4.0, 4.6])
def test_a_budget_neither_counts_nor_changes_the_head(target_bits, dense, tmp_path):
    recipe = make_recipe(target_bits=target_bits, preset="fast")
    recipe = replace(recipe, budget=replace(recipe.budget, most=16))
    request = {"recipe": recipe, "preset": "fast"} | SMALL
    plain = quantize(dense["untied"], tmp_path / "plain", **request)
    made = quantize(dense["untied"], tmp_path / "out", head_bits=3, **request)
    assert made.layers[:-1] == plain.layers
    assert made.bits_per_weight == plain.bits_per_weight <= target_bits
    kept = max(layer["num_salient"] for layer in plain.layers)
    assert (kept > 0) == (target_bits > 4.5)
    assert (made.layers[-1]["bits"], made.layers[-1]["num_salient"]) == (3, kept)


def test_directions_by_energy_are_the_heads_too(dense, tmp_path):
    made = quantize(dense["untied"], tmp_path / "out", salient_energy=0.5, head_bits=4, preset="fast", **SMALL)
    *blocks, head = (layer["num_salient"] for layer in made.layers)
    assert head == max(blocks) > 0


def test_the_head_keeps_no_more_directions_than_any_block_does(dense, tmp_path):
    """The other principal axes are mixed with the rest, because a block would hear them in every row's range."""
    recipe = make_recipe(target_bits=4.6, preset="fast", head_bits=3)
    recipe = replace(recipe, budget=replace(recipe.budget, most=4))
    made = quantize(dense["untied"], tmp_path / "out", recipe=recipe, preset="fast", **SMALL)
    *blocks, head = (layer["num_salient"] for layer in made.layers)
    assert head == max(blocks) <= 4


# --- resuming --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As hard a stop as a test can make inside one process."""


@pytest.mark.parametrize("stop_after", [("blocks", 1), ("tuning", 2), ("head", 0), ("head", 1), ("write", 2)])
def test_a_killed_run_resumes_bit_identically(stop_after, made, dense, tmp_path, monkeypatch):
    output, request = tmp_path / "out", TUNED | {"salient": 4, "head_bits": 4}

    def kill(event):
        if (event.stage, event.block) == stop_after:
            raise Killed

    with pytest.raises(Killed):
        quantize(dense["untied"], output, progress=kill, **request)
    with pytest.raises(ValueError, match=r"resume: got another request .*'recipe.head_bits': 3"):
        quantize(dense["untied"], output, resume=True, **request | {"head_bits": 3})
    passes = []
    monkeypatch.setattr(head_module, "_moments", spy(head_module._moments, passes))
    quantize(dense["untied"], output, resume=True, **request)
    assert len(passes) == (stop_after[0] != "write")  # a finished head is read back
    undisturbed = made["rosaq-gptq"][0]
    assert {path.name for path in output.iterdir()} == {path.name for path in undisturbed.iterdir()}
    for path in sorted(undisturbed.iterdir()):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def spy(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["gptq", "rosaq-gptq"])
def test_moments_are_those_of_the_finished_model(recipe, dense, tmp_path, monkeypatch):
    """Of what transformers hands the head of the checkpoint: blocks as tuned with the whole model, in float32."""
    from transformers import AutoModelForCausalLM

    grams = []

    def remember(*args):
        grams.append(real(*args))
        return grams[-1]

    real = head_module._moments
    monkeypatch.setattr(head_module, "_moments", remember)
    spec = replace(SMALL["spec"], bf16=False)
    quantize(dense["untied"], tmp_path / "out", recipe=recipe, salient=2, head_bits=4, **TUNED | {"spec": spec})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(calibration_ids(dense["untied"]))
    close = (grams[0] - seen[0].T @ seen[0] / len(seen[0])).norm() / grams[0].norm()
    assert close <= FLOORS[torch.float16]  # the embedding is stored in 16 bits


def test_tokens_that_overflow_name_the_head(dense):
    model = DenseModel(dense["untied"])
    plan = head_module.Plan(model.blocks, make_recipe("gptq", head_bits=4), head_module.Rotations(), [])
    with pytest.raises(ValueError, match=r"^lm_head: activations: got NaN, Inf"):
        head_module._moments(model, plan.rotations, plan.head, [torch.full((1, 4, 64), torch.nan)])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 5, 8, 0])
def test_a_width_without_a_layout_is_refused(bits, dense, tmp_path):
    with pytest.raises(ValueError, match=rf"head_bits: got {bits}, need one of \(3, 4, 16\)"):
        quantize(dense["untied"], tmp_path / "out", head_bits=bits, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_head_the_format_cannot_hold_is_refused_like_any_linear(dense, tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama(vocab_size=270))
    with pytest.raises(ValueError, match="lm_head: out_features: got 270, need a positive multiple of 8"):
        quantize(source, tmp_path / "out", recipe="rtn", head_bits=4, **SMALL)
    quantize(source, tmp_path / "out", recipe="rtn", **SMALL)  # in 16 bits any size will do
    model = DenseModel(dense["untied"]).blocks
    model._model.lm_head = torch.nn.Linear(96, VOCAB, bias=False, device="meta")
    with pytest.raises(ValueError, match="lm_head: group_size: got 64, need a divisor of in_features 96"):
        check_formats(model, make_recipe("rtn", group_size=64, head_bits=4))
    check_formats(model, make_recipe("rtn", group_size=64))
    model._model.lm_head = torch.nn.Linear(64, VOCAB, device="meta")
    with pytest.raises(ValueError, match=f"lm_head: bias: got one of {VOCAB} entries, need a head without"):
        check_formats(model, make_recipe("rtn", group_size=64))


def test_second_moments_that_cannot_be_inverted_name_the_head(dense, tmp_path, monkeypatch):
    from rosaq.quantizers import NotPositiveDefiniteError

    real = head_module.quantize_head

    def refuse(*_):
        raise NotPositiveDefiniteError("gram [64, 64] is not positive definite")

    def with_bad_quantiser(*args):
        monkeypatch.setattr("rosaq.pipeline.site.quantize_weight", refuse)
        return real(*args)

    monkeypatch.setattr("rosaq.pipeline.run.quantize_head", with_bad_quantiser)
    with pytest.raises(NotPositiveDefiniteError, match=r"^lm_head: gram \[64, 64\]"):
        quantize(dense["untied"], tmp_path / "out", recipe="gptq", head_bits=4, **SMALL)
    assert not (tmp_path / "out").exists()
