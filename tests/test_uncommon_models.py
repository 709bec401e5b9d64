"""Models that are legal and rare: blocks of zeros, no tokenizer, near ties between experts, several chat templates."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import rosaq
from rosaq.pipeline import quantize
from rosaq.pipeline.probe import Probe, check_equal
from rosaq.pipeline.source import DenseModel
from rosaq.recipes import RECIPES, make_recipe
from rosaq.report.console import wide_console
from rosaq.report.tables import eval_table
from rosaq.rotation import fold_norms, random_orthogonal, rotate_block
from rosaq.rotation.fuse import BlockRotations
from rosaq.specs import BudgetSpec
from tests.families import save_family, tiny_family
from tests.models import SMALL, TEXT, save_dense, tiny_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """Its first block adds nothing to the stream, as those do that deepen a model before it is trained further."""
    model = tiny_llama()
    for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    return save_dense(tmp_path_factory.mktemp("idle") / "model", model)


@pytest.mark.parametrize(
    "request_", [{"target_bits": 4.6}, {"salient_energy": 0.5}, {"salient": 2}, {"recipe": "gptq"}]
)
def test_a_block_that_adds_nothing(request_, idle, tmp_path):
    preset = "default" if "target_bits" in request_ else "fast"  # tuned, and with rows that hear of each other
    made = quantize(idle, tmp_path / "out", preset=preset, **SMALL | request_)
    assert rosaq.verify(tmp_path / "out").is_sound
    layers = {layer["name"].removeprefix("model.layers."): layer for layer in made.layers}
    assert layers["0.mlp.down_proj"]["sqnr_db"] == 300
    text = (tmp_path / "out" / "rosaq_layers.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["layers"] == made.layers
    if "target_bits" in request_:
        assert layers["0.self_attn.q_proj"]["bits"] == layers["0.mlp.up_proj"]["bits"] == 3
        assert {layer["bits"] for layer in made.layers} == {3, 4}
    if "salient_energy" in request_:
        assert layers["0.mlp.up_proj"]["num_salient"] == 0 < layers["1.mlp.up_proj"]["num_salient"]


# --- the proof that rotating changed nothing, with a router that may choose -------------------------------------------


def test_a_few_tokens_of_a_mixture_may_go_to_another_expert():
    want = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[0, :2] += 1.0
    assert check_equal(got, want, "block", 1 / 32) == 0
    with pytest.raises(ValueError, match="block: the folded and rotated model differs by"):
        check_equal(got, want, "block")
    got[0, 2] += 1.0
    with pytest.raises(ValueError, match="block: the folded and rotated model differs by"):
        check_equal(got, want, "block", 1 / 32)
    got = want.clone()
    got[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="block: the folded and rotated model differs by"):
        check_equal(got, want, "block", 1 / 32)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_of_a_mixture_start_from_the_dense_model_and_wrong_ones_are_found(family, tmp_path):
    source = DenseModel(save_family(tmp_path / "dense", tiny_family(family)))
    model, block = source.blocks, source.block(0)
    residual = random_orthogonal(64, torch.Generator().manual_seed(0))
    rotations = BlockRotations(residual)
    rotated = rotate_block(fold_norms(block, model.family), rotations, model.family, model.sizes)
    hidden = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(1))
    probe = Probe(hidden, (hidden.double() @ residual).float())
    after = probe.step(model, 0, block, rotated, rotations)
    exact = (after.dense.double() @ residual).float()
    assert torch.equal(after.rotated, exact) == (family == "qwen3_moe")
    wrong = rotated | {"self_attn.o_proj.weight": block["self_attn.o_proj.weight"]}
    with pytest.raises(ValueError, match=r"model\.layers\.0: the folded and rotated model differs by"):
        probe.step(model, 0, block, wrong, rotations)


# --- what needs no text, no tokenizer, no vocabulary in memory --------------------------------------------------------


def test_rounding_to_nearest_looks_at_no_text(tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama(max_position_embeddings=32))  # shorter than a window
    for path in source.glob("*token*"):
        path.unlink()
    made = quantize(source, tmp_path / "out", recipe="rtn", group_size=32)
    assert {layer["measured_on"] for layer in made.layers} == {"weights"}
    with pytest.raises(FileNotFoundError, match=r"none\.txt: got no such file"):
        quantize(source, tmp_path / "no", recipe="rtn", group_size=32, calibration="none.txt")
    with pytest.raises(ValueError, match="sequence_length: got 512, need at most 32"):
        quantize(source, tmp_path / "no", recipe="gptq", group_size=32, calibration=TEXT)


def test_rows_of_a_matrix_are_read_in_parts(dense, monkeypatch):
    monkeypatch.setattr("rosaq.pipeline.source._ROWS_AT_ONCE", 16)
    source = DenseModel(dense)
    whole = source.get(source.embedding_name)
    for index in ([0], [3, 15, 16, 17, 200], [255], list(range(0, 256, 3))):
        assert torch.equal(source.get_rows(source.embedding_name, torch.tensor(index)), whole[index])


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_target_out_of_reach_is_refused_before_any_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("rosaq.pipeline.quantize"), "Workspace", None)
    request = {name: value for name, value in SMALL.items() if name != "group_size"}
    for target, most in ((3.2, r"4\.444"), (5.5, r"4\.861")):  # in whole rows, in groups of 32
        with pytest.raises(ValueError, match=rf"target_bits: got {target}, need 3\.444 to {most} for this model"):
            quantize(dense, tmp_path / "out", target_bits=target, **request)
    most = replace(make_recipe().budget, target_bits=9.0, most=4)
    with pytest.raises(ValueError, match=r"target_bits: got 9\.0, need 3\.4.* to 5\."):  # directions are bits, too
        quantize(dense, tmp_path / "out", recipe=replace(make_recipe(), budget=most), **request)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_your_own_keeps_its_groups():
    own = replace(RECIPES["rosaq-gptq"], name="mine", quant=replace(RECIPES["rosaq-gptq"].quant, group_size=128))
    assert make_recipe(own, salient_energy=0.9).quant.group_size == 128


def test_directions_by_energy_at_a_width_that_no_target_could_choose(dense, tmp_path):
    fitted = replace(make_recipe(preset="fast"), budget=BudgetSpec(energy=0.5, widths=(4,)))
    made = quantize(dense, tmp_path / "out", recipe=fitted, preset="fast", **SMALL)
    assert {layer["bits"] for layer in made.layers} == {3}


# --- files ------------------------------------------------------------------------------------------------------------


def test_chat_templates_come_along(tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama())
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    quantize(source, tmp_path / "out", recipe="rtn", group_size=32)
    rosaq.convert(tmp_path / "out", tmp_path / "again", to="dense")
    for made in ("out", "again"):
        assert (tmp_path / made / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
        assert not (tmp_path / "again" / "rosaq_layers.json").exists()


def test_brackets_in_a_path_are_printed(capsys):
    scores = dict.fromkeys(("ppl", "bits_per_byte", "seconds"), 1.0) | dict.fromkeys(("kl", "kl_p99", "top1_agreement"))
    name = "[bold]x[/bold]/a[/b]"
    result = scores | {"model": name, "text": name, "documents": "0:9", "context": 512, "windows": 1}
    result |= {"dtype": "float32", "reference": name, "bits_per_weight": None, "bytes": None}
    wide_console().print(eval_table([result]))
    assert capsys.readouterr().out.count("[bold]x[/bold]/a[/b]") == 3
