"""rosaq convert: the same codes in another format, so the same function; what has no place is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.config import LinearFormat
from rosaq.conversion import convert, exporters
from rosaq.layout import zero_points
from rosaq.linear import RosaqLinear
from tests.foreign import awq, compressed, gptq, save_foreign
from tests.models import random_linear, save_dense, save_rosaq, tiny_llama, vandalise
from tests.tolerances import assert_close_in, assert_same_function

INPUT_IDS = torch.arange(24).view(2, 12)
ROTATED = LinearFormat(4, 32, num_salient=3, salient="basis", rotation_blocks=1, rotation_size=32)
Q_PROJ = "model.layers.1.self_attn.q_proj"


def config_of(method, **values):
    return {"quant_method": method, "bits": 4, "group_size": 32, **values}


GPTQ = config_of("gptq", desc_act=False)
AWQ = config_of("awq", version="gemm", zero_point=True)
WEIGHTS = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32, "type": "int"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
}

FOREIGN = {
    "gptq-4": (gptq, GPTQ, {"bits": 4}),
    "gptq-3": (gptq, GPTQ, {"bits": 3}),
    "gptq-3-symmetric": (gptq, GPTQ, {"bits": 3, "symmetric": True}),
    "gptq-v2": (gptq, GPTQ | {"checkpoint_format": "gptq_v2"}, {"bits": 4, "version": 2}),
    "gptq-one-group": (gptq, GPTQ, {"bits": 4, "group_size": 64}),
    "awq": (awq, AWQ, {"bits": 4}),
    "compressed-4-symmetric": (compressed, COMPRESSED, {"bits": 4, "symmetric": True}),
    "compressed-4": (compressed, COMPRESSED, {"bits": 4, "scale_dtype": torch.bfloat16}),
    "compressed-3": (compressed, COMPRESSED, {"bits": 3}),
    "compressed-3-old": (compressed, COMPRESSED, {"bits": 3, "tens": True}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_checkpoint_means_the_same_in_our_layout(tmp_path, name):
    pack, config, options = FOREIGN[name]
    dense = save_foreign(tmp_path / "foreign", pack, config, **options)
    result = convert(tmp_path / "foreign", tmp_path / "out")
    assert (result.target_format, result.num_linears) == ("rosaq", 14)
    assert rosaq.verify(tmp_path / "out", sample=14).is_sound
    read = rosaq.read_config(tmp_path / "out")
    assert (read.default.bits, read.default.symmetric) == (options["bits"], options.get("symmetric", False))
    assert read.modules_to_not_convert == ("lm_head",)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, RosaqLinear):
            assert torch.equal(module.dequantize(), dense.get_submodule(path).weight), path
    assert_same_function(model(INPUT_IDS).logits, dense(INPUT_IDS).logits)


@pytest.fixture(name="checkpoint")
def _checkpoint(tmp_path):
    default = LinearFormat(3, 32, num_salient=4)
    return save_rosaq(
        tmp_path / "model", tiny_llama(attention_bias=True), default=default, modules={"mlp.down_proj": ROTATED}
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_export_is_a_plain_model_of_the_same_function(tmp_path, checkpoint, dtype):
    result = convert(checkpoint, tmp_path / "dense", dtype=dtype)
    assert (result.source_format, result.target_format) == ("rosaq", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert plain.dtype == getattr(torch, dtype)
    assert type(plain.model.layers[0].mlp.down_proj) is torch.nn.Linear
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same_function(plain(INPUT_IDS).logits, model(INPUT_IDS).logits, stored_in=getattr(torch, dtype))


PLAIN = {
    "int4-symmetric": {"default": LinearFormat(4, 64, symmetric=True)},
    "int3-symmetric": {"default": LinearFormat(3, 32, symmetric=True)},
    "int4-one-group": {"default": LinearFormat(4, -1)},
    "int3": {"default": LinearFormat(3, 32)},
    "mixed": {"default": LinearFormat(4, 32), "modules": {"mlp.down_proj": LinearFormat(3, 32, symmetric=True)}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_compressed_tensors_decompresses_our_export(tmp_path, name):
    checkpoint = save_rosaq(tmp_path / "model", **PLAIN[name])
    shift_zeros(checkpoint)
    convert(checkpoint, tmp_path / "compressed", to="compressed-tensors")
    values = json.loads((tmp_path / "compressed" / "config.json").read_text())["quantization_config"]
    config, tensors = QuantizationConfig(**values), load_file(tmp_path / "compressed" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, RosaqLinear):
            own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{path}.weight_")}
            weight = PackedQuantizationCompressor.decompress(own, scheme_of(config, path))["weight"]
            assert_close_in(weight.float(), module.dequantize(), torch.float16)


def shift_zeros(checkpoint):
    """Zero points that are not all in the middle."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".zeros")]:
            tensors[name] = (tensors[name] + torch.arange(tensors[name].numel()).view_as(tensors[name])).byte() % 8

    vandalise(checkpoint, change)


def scheme_of(config, path):
    """The group of `config` that the library would take for the linear at `path`."""
    groups = config.config_groups.values()
    (found,) = [g for g in groups if g.targets == ["Linear"] or any(re.match(t[3:], path) for t in g.targets)]
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["int4-symmetric", "int3-symmetric"])
def test_transformers_reads_our_compressed_export(tmp_path, name):
    # Not the asymmetric ones: transformers 5.23 with compressed-tensors 0.20 expects zero points unpacked.
    checkpoint = save_rosaq(tmp_path / "model", **PLAIN[name])
    convert(checkpoint, tmp_path / "compressed", to="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype=torch.float32)
    assert_close_in(theirs(INPUT_IDS).logits, model(INPUT_IDS).logits, torch.bfloat16)


@pytest.mark.parametrize("name", PLAIN)
def test_export_and_import_give_the_same_tensors(tmp_path, name):
    checkpoint = save_rosaq(tmp_path / "model", **PLAIN[name])
    shift_zeros(checkpoint)
    convert(checkpoint, tmp_path / "compressed", to="compressed-tensors")
    convert(tmp_path / "compressed", tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key in after:
        assert torch.equal(after[key], before[key]), key


def test_progress_and_files(tmp_path, checkpoint):
    seen = []
    convert(checkpoint, tmp_path / "dense", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14)
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    assert (tmp_path / "dense" / "SHA256SUMS").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_salient_directions_have_no_place_in_compressed_tensors(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"down_proj: got 3 salient directions and an online rotation of size 32"):
        convert(checkpoint, tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.glob("*out*")), "nothing half-written is left"


def test_zero_points_between_codes_have_no_place_in_compressed_tensors():
    fmt = LinearFormat(3, 32)
    tensors = random_linear(fmt, 16, 64, 0)
    between = int((zero_points(tensors["zeros"]) % 1 > 0).sum())
    assert between
    with pytest.raises(ValueError, match=rf"q: got {between} zero points that are no codes, need whole ones"):
        exporters.compressed("q", fmt, tensors, torch.float16)


def test_float16_overflow_is_told(tmp_path, checkpoint):
    vandalise(checkpoint, lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(60000))
    with pytest.raises(ValueError, match=r"q_proj.weight: got values up to .* need dtype bfloat16"):
        convert(checkpoint, tmp_path / "out")


def damaged(tensor, value):
    return lambda tensors: tensors.update({f"{Q_PROJ}.{tensor}": value(tensors[f"{Q_PROJ}.{tensor}"])})


@pytest.mark.parametrize(
    ("name", "config", "change", "message"),
    [
        ("gptq-4", {}, damaged("g_idx", lambda t: t.flip(0)), "q_proj: got channels grouped in another order"),
        ("gptq-4", {}, lambda t: t.pop(f"{Q_PROJ}.qzeros"), "q_proj.qzeros: got no such tensor"),
        ("gptq-4", {}, damaged("scales", lambda t: t.float() * 1e-7), "q_proj.scales: got .* float16 cannot hold"),
        ("gptq-4", {}, damaged("bias", lambda t: t.float() + 1e5), "q_proj.bias: got .* need smaller ones"),
        ("awq", {"version": "gemv"}, None, "version: got 'gemv', need 'gemm'"),
        ("compressed-4", {"format": "float-quantized"}, None, "format: got 'float-quantized'"),
        ("compressed-4", {"transform_config": {"R4": 1}}, None, "transform_config: got online transforms"),
    ],
)
def test_what_we_cannot_import_is_refused(tmp_path, name, config, change, message):
    pack, values, options = FOREIGN[name]
    save_foreign(tmp_path / "foreign", pack, values | config, **options)
    if change:
        vandalise(tmp_path / "foreign", change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "foreign", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, r"to: got 'gguf' for a rosaq checkpoint, need one of \['dense', 'compressed-tensors'\]"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"to": "compressed-tensors", "dtype": "float16"}, "dtype: got 'float16' for the target 'compressed-tensors'"),
    ],
)
def test_bad_requests_are_refused(tmp_path, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, tmp_path / "out", **options)


def test_dense_checkpoints_and_full_outputs_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="got a dense checkpoint, need rosaq or one of"):
        convert(save_dense(tmp_path / "dense"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    with pytest.raises(ValueError, match="output: got .* not empty"):
        convert(checkpoint, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="source: got .*none.*, need a model directory or a hub name"):
        convert(tmp_path / "none", tmp_path / "out")


def test_an_import_takes_no_dtype(tmp_path):
    pack, values, options = FOREIGN["gptq-4"]
    save_foreign(tmp_path / "foreign", pack, values, **options)
    with pytest.raises(ValueError, match="dtype: got 'bfloat16' for the target 'rosaq', need none"):
        convert(tmp_path / "foreign", tmp_path / "out", dtype="bfloat16")


def test_outputs_that_cannot_be_replaced_are_refused_before_any_work(tmp_path, checkpoint, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for output in (".", "..", inside):
        with pytest.raises(ValueError, match="output: got .* which holds the working directory"):
            convert(checkpoint, output, force=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with pytest.raises(ValueError, match="output: got .*mounted, a mount point, which cannot be renamed"):
        convert(checkpoint, tmp_path / "mounted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "model"]


def test_force_never_deletes_the_source_or_what_is_no_model(tmp_path, checkpoint):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    refused = {checkpoint: "holds the source", tmp_path: "holds the source", folder: "holds no model"}
    for output, message in refused.items():
        with pytest.raises(ValueError, match=f"output: got .* which {message}"):
            convert(checkpoint, output, force=True)
    assert (folder / "chapter.txt").read_text() == "mine"
    assert (checkpoint / "config.json").is_file()


def test_a_link_stands_for_its_target(tmp_path, checkpoint):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    convert(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "target"]


def test_the_earlier_output_comes_back_where_renaming_fails(tmp_path, checkpoint, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    (output / "config.json").write_text("{}")

    def busy(self, target):
        if self.name == ".out.writing":
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"):
        convert(checkpoint, output, force=True)
    assert (output / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    monkeypatch.undo()
    (tmp_path / ".out.replaced").symlink_to("nowhere")  # of a crash
    convert(checkpoint, output, force=True)
    assert not (output / "precious.txt").exists()
