"""A checkpoint with a quantised head: loaded, run, saved, looked at and converted; refused where it cannot be run."""

import importlib
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.checkpoint import bits_by_tensor, bits_per_weight, total_bytes
from rosaq.cli import main
from rosaq.config import LinearFormat
from rosaq.conversion import convert
from rosaq.integrations.transformers import RosaqConfig
from rosaq.integrations.vllm_linear import check_head
from rosaq.layout import dense_weight
from rosaq.linear import RosaqLinear
from rosaq.pipeline import quantize
from rosaq.report.inspect import linears_by_kind
from rosaq.verification import verify
from tests.families import CHANGES, save_family, tiny_family
from tests.models import SMALL, TEXT, save_dense, tiny_llama, vandalise
from tests.test_transformers_parallel import run_ranks
from tests.tolerances import assert_as_good_as, assert_same_function

VOCAB = 272  # cut between two ranks
INPUT_IDS = torch.arange(24).view(2, 12)
GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = tiny_family("llama", vocab_size=VOCAB, tie_word_embeddings=True)
    return save_family(tmp_path_factory.mktemp("dense") / "model", model)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(dense, tmp_path_factory):
    """Rotated, so with principal channels at the head, beside blocks of another width."""
    output = tmp_path_factory.mktemp("made") / "out"
    quantize(dense, output, preset="fast", bits=3, head_bits=4, salient=4, **SMALL)
    return output


@pytest.fixture(name="copy")
def _copy(checkpoint, tmp_path):
    """One that a test may damage."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


@torch.no_grad()
def logits_of(model):
    return model(INPUT_IDS).logits


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_head_is_a_packed_linear_that_computes_what_its_dense_twin_does(checkpoint, dtype):
    model = load(checkpoint, dtype)
    head = model.get_output_embeddings()
    assert head is model.lm_head
    assert isinstance(head, RosaqLinear)
    assert head.packed is not None
    assert (head.format.bits, head.format.num_salient, model.model.layers[0].mlp.up_proj.format.bits) == (4, 4, 3)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    twin = load(checkpoint)
    assert type(twin.dequantize(torch.float64).lm_head) is torch.nn.Linear
    exact, plain = logits_of(twin.double()), logits_of(load(checkpoint).dequantize(dtype).to(dtype))
    assert_as_good_as(logits_of(model), plain, exact)


@pytest.mark.filterwarnings("ignore:.*got fewer tokens than their:UserWarning")
@pytest.mark.filterwarnings("ignore:.*got a recipe that rotates the residual stream:UserWarning")
@pytest.mark.filterwarnings("ignore:.*codes come on top:UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_every_family_runs_with_a_quantised_head(name, tmp_path):
    source = save_family(tmp_path / "dense", tiny_family(name, vocab_size=VOCAB))
    quantize(source, tmp_path / "out", preset="fast", bits=4, head_bits=4, salient=2, **SMALL)
    model, want = load(tmp_path / "out"), logits_of(load(source))
    assert isinstance(model.get_output_embeddings(), RosaqLinear)
    assert torch.cosine_similarity(logits_of(model).flatten(), want.flatten(), dim=0) > 0.95
    assert {check.status for check in verify(tmp_path / "out", sample=1).checks} == {"ok"}


def test_it_generates_with_and_without_a_cache(checkpoint):
    model = load(checkpoint)
    tokens = model.generate(INPUT_IDS, **GENERATE)
    assert tokens.shape == (2, 20)
    assert torch.equal(tokens, model.generate(INPUT_IDS, use_cache=False, **GENERATE))
    twin = load(checkpoint).dequantize()
    assert torch.equal(tokens, twin.generate(INPUT_IDS, **GENERATE))


def test_it_compiles_whole(checkpoint):
    model = load(checkpoint)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(INPUT_IDS).logits, logits_of(model))


def test_saving_is_bit_exact_and_ties_nothing(checkpoint, tmp_path):
    model = load(checkpoint, torch.float16)
    model.tie_weights()  # what resizing and loading do
    assert isinstance(model.lm_head, RosaqLinear)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = [json.loads((d / "config.json").read_text()) for d in (checkpoint, tmp_path / "again")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    assert config[1]["tie_word_embeddings"] is False
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(load(checkpoint)))


@torch.no_grad()
def test_two_ranks_compute_what_one_does(checkpoint, tmp_path, free_port):
    want = logits_of(load(checkpoint))
    # at the head each rank makes half of the vocabulary, from all channels
    for rank, answer in enumerate(run_ranks(checkpoint, tmp_path, free_port, linear="mlp.down_proj")):
        assert answer["packed"]
        assert "got a model cut between ranks" in answer["error"]
        got = torch.load(tmp_path / f"logits-{rank}.pt")
        assert got.shape == want.shape
        assert_same_function(got, want)


def test_ranks_that_do_not_divide_the_head_are_refused(tmp_path, free_port):
    source = save_dense(tmp_path / "dense", tiny_llama())  # 264 rows
    quantize(source, tmp_path / "model", recipe="rtn", head_bits=4, **SMALL)
    for answer in run_ranks(tmp_path / "model", tmp_path, free_port):
        assert "tensor parallel size: got 2, need one of [1" in answer["error"]
        assert "out_features 264 is no multiple of 8 times 2" in answer["error"]


def test_a_head_that_is_quantised_and_tied_is_refused(copy):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="tie_word_embeddings: got True and a quantised lm_head, need False"):
        load(copy)
    (problem,) = [check.detail for check in verify(copy).checks if check.name == "model"]
    assert "tie_word_embeddings: got True and a quantised lm_head" in problem


@pytest.mark.parametrize("tensor", ["qweight", "scales", "zeros", "salient_weight", "salient_index"])
def test_a_missing_tensor_of_the_head_is_named(copy, tensor):
    vandalise(copy, lambda tensors: tensors.pop(f"lm_head.{tensor}"))
    with pytest.raises(ValueError, match=rf"lm_head.{tensor}: got no such tensor|lm_head.qweight: got no such tensor"):
        load(copy)


def test_a_dense_head_is_rounded_while_it_loads_where_asked_for(tmp_path):
    source = save_family(tmp_path / "dense", tiny_family("llama", vocab_size=VOCAB))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float16, quantization_config=RosaqConfig(4, 32, modules_to_not_convert=[])
    )
    quantize(source, tmp_path / "rtn", recipe="rtn", bits=4, head_bits=4, **SMALL)
    assert torch.equal(model.lm_head.dequantize(), load(tmp_path / "rtn").lm_head.dequantize())
    tied = save_family(tmp_path / "tied", tiny_family("llama", vocab_size=VOCAB, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="got True and a quantised lm_head, need False: .* modules_to_not_convert"):
        AutoModelForCausalLM.from_pretrained(tied, quantization_config=RosaqConfig(4, 32, modules_to_not_convert=[]))


# --- looked at -------------------------------------------------------------------------------------------------------


def test_verify_looks_at_the_head_too(copy):
    verdict = verify(copy, sample=15)
    assert {check.status for check in verdict.checks} == {"ok"}, verdict.checks
    (tensors,) = [check.detail for check in verdict.checks if check.name == "tensors"]
    assert tensors.startswith("15 quantised linears")
    (copy / "SHA256SUMS").unlink()
    vandalise(copy, lambda tensors: tensors["lm_head.zeros"].add_(1))
    (problem,) = [check.detail for check in verify(copy).checks if check.status == "failed"]
    assert problem.startswith("lm_head.qweight: got 4 salient columns whose codes are not the zero point")


def test_verify_compares_every_row_of_a_long_head(checkpoint, monkeypatch):
    """The reference goes through the rows in parts: one wrong row at the end must be seen."""
    monkeypatch.setattr("rosaq.verification.linears._ROWS_AT_ONCE", 96)
    assert verify(checkpoint, sample=15).is_sound
    forward = RosaqLinear.forward

    def wrong_at_the_end(self, x):
        y = forward(self, x)
        y[:, -1] *= 1 + 0.1 * (self.out_features == VOCAB)
        return y

    monkeypatch.setattr(RosaqLinear, "forward", wrong_at_the_end)
    (problem,) = [check.detail for check in verify(checkpoint, sample=15).checks if check.status == "failed"]
    assert "(lm_head)" in problem


def test_inspect_and_eval_count_bits_of_blocks_and_bytes_of_all(checkpoint, dense, tmp_path, capsys):
    (head,) = [kind for kind in linears_by_kind(checkpoint) if kind["kind"] == "lm_head"]
    assert (head["count"], head["shape"]) == (1, f"{VOCAB} x 64")
    model = load(checkpoint)
    assert head["bits_per_weight"] == model.lm_head.bits_per_weight
    assert head["sqnr_mean_db"] > 10
    result = rosaq.evaluate(checkpoint, reference=dense, windows=2, context=32, text=TEXT)
    assert result.bytes == total_bytes(checkpoint)
    assert result.kl < 1
    quantize(dense, tmp_path / "left", preset="fast", bits=3, salient=4, **SMALL)
    left = rosaq.evaluate(tmp_path / "left", windows=2, context=32, text=TEXT)
    assert result.bits_per_weight == left.bits_per_weight == pytest.approx(bits_per_weight(checkpoint))
    assert bits_by_tensor(checkpoint) == bits_by_tensor(tmp_path / "left")
    assert left.bytes - result.bytes == 2 * VOCAB * 64 - head["bytes"]
    with pytest.raises(SystemExit):
        main(["inspect", str(checkpoint), "--layers"])
    shown = capsys.readouterr().out
    assert "lm_head" in shown
    assert "int4 g32 asymmetric, 4 salient (index)" in " ".join(shown.split())


def test_the_command_line_takes_head_bits(dense, tmp_path, capsys):
    sizes = ["--group-size", "32", "--num-sequences", "4", "--sequence-length", "32", "--preset", "fast"]
    command = ["quantize", str(dense), "-o", str(tmp_path / "out"), "--salient", "4", "--head-bits", "3", *sizes]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--json", str(tmp_path / "record.json")])
    assert not stop.value.code
    assert "bits/weight of the head" in capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["request"]["head_bits"] == 3
    assert record["result"]["layers"][-1]["name"] == "lm_head"
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(dense), "-o", str(tmp_path / "bad"), "--head-bits", "8"])
    assert stop.value.code == 2
    assert "error: head_bits: got 8, need one of (3, 4, 16)" in capsys.readouterr().err


# --- converted -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dense_export_is_a_plain_untied_model_of_the_same_function(checkpoint, tmp_path):
    assert convert(checkpoint, tmp_path / "dense", dtype="float32").num_linears == 15
    plain = load(tmp_path / "dense")
    assert type(plain.lm_head) is torch.nn.Linear
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    tensors = load_file(checkpoint / "model.safetensors")
    own = {n.removeprefix("lm_head."): t for n, t in tensors.items() if n.startswith("lm_head.")}
    fmt = rosaq.read_config(checkpoint).format_of("lm_head")
    assert torch.equal(plain.lm_head.weight, dense_weight(own, fmt))
    assert_same_function(logits_of(plain), logits_of(load(checkpoint)))


@torch.no_grad()
def test_compressed_tensors_takes_a_head_without_directions(checkpoint, tmp_path):
    source = save_family(tmp_path / "dense", tiny_family("llama", vocab_size=VOCAB))
    quantize(source, tmp_path / "out", recipe="rtn", bits=4, symmetric=True, head_bits=4, **SMALL)
    convert(tmp_path / "out", tmp_path / "compressed", to="compressed-tensors")
    theirs, ours = load(tmp_path / "compressed"), load(tmp_path / "out")
    assert_same_function(logits_of(theirs), logits_of(ours), stored_in=torch.float16)
    with pytest.raises(ValueError, match=r"lm_head: got 4 salient directions .* need none of both"):
        convert(checkpoint, tmp_path / "refused", to="compressed-tensors")
    assert not (tmp_path / "refused").exists()


# --- vLLM ------------------------------------------------------------------------------------------------------------


def test_vllm_is_refused_before_the_engine_starts():
    check_head(["model.layers.0.mlp.up_proj", "model.layers.11.self_attn.q_proj"])
    with pytest.raises(NotImplementedError, match=r"^lm_head: got a quantised output head, .*--head-bits 16.*convert"):
        check_head(["model.layers.0.mlp.up_proj", "lm_head"])


@pytest.fixture
def plugin(monkeypatch):
    """rosaq's plugin on stand-ins for the classes of vLLM that it extends or looks for (the engine: test_vllm.py)."""
    names = {
        "distributed": ["get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"],
        "model_executor.layers.linear": ["LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"],
        "model_executor.layers.quantization": ["register_quantization_config"],
        "model_executor.layers.quantization.base_config": ["QuantizationConfig"],
        "model_executor.layers.vocab_parallel_embedding": ["ParallelLMHead"],
        "model_executor.utils": ["set_weight_attrs"],
        "platforms": ["current_platform"],
    }
    bases = {"LinearBase": (torch.nn.Module,), "ParallelLMHead": (torch.nn.Module,)}
    for module, classes in names.items():
        made = ModuleType(f"vllm.{module}")
        for name in classes:
            setattr(made, name, type(name, bases.get(name, ()), {"packed_modules_mapping": {}}))
        parts = made.__name__.split(".")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.delitem(sys.modules, "rosaq.integrations.vllm", raising=False)
    yield importlib.import_module("rosaq.integrations.vllm")
    sys.modules.pop("rosaq.integrations.vllm", None)


def test_the_plugin_refuses_vllms_head_and_says_what_to_do(plugin, checkpoint, dense, tmp_path):
    config = plugin.RosaqVllmConfig(rosaq.read_config(checkpoint))
    with pytest.raises(NotImplementedError, match="lm_head: got a quantised output head, need one in 16 bits"):
        config.maybe_update_config(str(checkpoint))
    with pytest.raises(
        NotImplementedError, match=r"quantise with --head-bits 16.*`rosaq convert DIR -o OUT --to dense`"
    ):
        config.get_quant_method(plugin.ParallelLMHead(), "lm_head")
    assert isinstance(
        config.get_quant_method(plugin.LinearBase(), "model.layers.0.mlp.down_proj"), plugin.RosaqLinearMethod
    )
    left = plugin.RosaqVllmConfig(replace(config.checkpoint, modules_to_not_convert=("lm_head",)))
    assert left.get_quant_method(plugin.ParallelLMHead(), "lm_head") is None
    quantize(dense, tmp_path / "left", recipe="rtn", **SMALL)
    plugin.RosaqVllmConfig(rosaq.read_config(tmp_path / "left")).maybe_update_config(str(tmp_path / "left"))


def test_formats_of_the_head_are_found_by_its_full_name(checkpoint):
    config = rosaq.read_config(checkpoint)
    assert config.format_of("lm_head") == LinearFormat(4, 32, num_salient=4)
    assert config.format_of("model.layers.0.mlp.up_proj").bits == 3
