"""rosaq convert against the model that config.json describes: every linear by its name there, or a refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.config import LinearFormat
from rosaq.conversion import convert
from rosaq.linear import RosaqLinear
from tests.families import tiny_family
from tests.foreign import awq, compressed, gptq, save_foreign
from tests.models import change_config, save_rosaq, vandalise
from tests.tolerances import assert_close_in, assert_same_function

INPUT_IDS = torch.arange(24).view(2, 12)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
PACKS = {"gptq": (gptq, GPTQ), "awq": (awq, AWQ), "compressed-tensors": (compressed, COMPRESSED)}
O_PROJ = "model.layers.0.self_attn.o_proj"


# --- a mixture, whose files have other names than memory ------------------------------------------------------------


def linear_views(model):
    """{name on the hub: the dense weight [n, k] in memory} of every linear but the head of a Mixtral."""
    views = {}
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            views[f"{prefix}.self_attn.{name}"] = getattr(layer.self_attn, name).weight
        experts = layer.mlp.experts
        for expert, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = both.chunk(2)
            named = {"w1": gate, "w3": up, "w2": down}
            views |= {f"{prefix}.block_sparse_moe.experts.{expert}.{name}": view for name, view in named.items()}
    return views


@torch.no_grad()
def save_mixtral(directory, method):
    """A tiny Mixtral with random codes under the hub's names; returns the dense float32 model that it means."""
    model, generator = tiny_family("mixtral"), torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    tensors = {
        name.replace(".mlp.", ".block_sparse_moe."): tensor.half()
        for name, tensor in model.state_dict().items()
        if not name.endswith("proj.weight") and ".experts." not in name
    }
    pack, config = PACKS[method]
    for name, view in linear_views(model).items():
        n, k = view.shape
        codes, zeros = (
            torch.randint(0, 16, (n, count), generator=generator, dtype=torch.uint8) for count in (k, k // 32)
        )
        scales = ((0.5 + torch.rand(n, k // 32, generator=generator)) / 8 / k**0.5).half()
        view.copy_((codes.float() - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1))
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in pack(codes, scales, zeros, 4).items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = model.config.to_dict() | {"dtype": "float16", "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(values, default=str))
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", PACKS)
def test_experts_of_the_hub_are_quantised_in_our_layout(tmp_path, method):
    dense = save_mixtral(tmp_path / "foreign", method)
    result = convert(tmp_path / "foreign", tmp_path / "out")
    assert result.num_linears == 2 * (4 + 3 * 4)
    assert rosaq.read_config(tmp_path / "out").modules_to_not_convert == ("lm_head",)
    assert rosaq.verify(tmp_path / "out", sample=4).is_sound
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(module, RosaqLinear) for module in model.modules()) == result.num_linears
    assert_same_function(model(INPUT_IDS).logits, dense(INPUT_IDS).logits)


@torch.no_grad()
def test_our_layout_under_the_names_of_the_hub_loads_too(tmp_path):
    dense = save_mixtral(tmp_path / "foreign", "gptq")
    convert(tmp_path / "foreign", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_function(model(INPUT_IDS).logits, dense(INPUT_IDS).logits)


def test_a_mixture_for_other_engines_has_the_names_of_the_hub_and_a_router_that_is_left_alone(tmp_path):
    save_mixtral(tmp_path / "foreign", "compressed-tensors")
    convert(tmp_path / "foreign", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", to="compressed-tensors")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("foreign", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    values = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    routers = [f"model.layers.{number}.block_sparse_moe.gate" for number in range(2)]
    assert values["ignore"] == [*routers, "lm_head"]


# --- linears that are not quantised ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("skip", "dense"),
    [("layers.1.self_attn.q_proj", "q_proj"), ("model.layers.1.self_attn", "q_proj k_proj v_proj o_proj")],
)
def test_compressed_tensors_ignores_what_is_dense(tmp_path, skip, dense):
    """transformers and rosaq match by prefix or suffix, compressed-tensors by the full name."""
    checkpoint = save_rosaq(tmp_path / "model", default=LinearFormat(4, 64, symmetric=True))
    names, generator = [f"model.layers.1.self_attn.{name}" for name in dense.split()], torch.Generator().manual_seed(3)

    def make_dense(tensors):
        for name in names:
            n, _ = (tensors.pop(f"{name}.{key}") for key in ("qweight", "scales"))
            tensors[f"{name}.weight"] = (torch.randn(len(n), 64, generator=generator) / 8).half()

    vandalise(checkpoint, make_dense)
    change_config(checkpoint, lambda v: v["quantization_config"].update(modules_to_not_convert=["lm_head", skip]))
    output = tmp_path / "compressed"
    convert(checkpoint, output, to="compressed-tensors")
    values = json.loads((output / "config.json").read_text())["quantization_config"]
    assert sorted(values["ignore"]) == sorted([*names, "lm_head"])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (checkpoint, output))
    assert_close_in(theirs(INPUT_IDS).logits, ours(INPUT_IDS).logits, torch.bfloat16)


def test_a_bias_of_zeros_that_the_model_has_not_is_left_out(tmp_path):
    without_bias(tmp_path / "foreign")
    convert(tmp_path / "foreign", tmp_path / "out")
    assert rosaq.verify(tmp_path / "out").is_sound
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith(".bias")]


def test_a_bias_that_the_model_has_not_is_refused(tmp_path):
    without_bias(tmp_path / "foreign")
    vandalise(tmp_path / "foreign", lambda tensors: tensors[f"{O_PROJ}.bias"][3:4].fill_(0.5))
    with pytest.raises(ValueError, match=rf"{O_PROJ}.bias: got numbers other than 0, need no such tensor"):
        convert(tmp_path / "foreign", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def without_bias(directory):
    """As older AutoGPTQ: a model without biases, in files that have one of zeros for every linear."""
    save_foreign(directory, gptq, GPTQ, bits=4)
    change_config(directory, lambda values: values.update(attention_bias=False))
    vandalise(directory, lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith(".bias")])


# --- refusals and settings ------------------------------------------------------------------------------------------


def test_codes_without_a_linear_in_the_model_are_refused_before_anything_is_read(tmp_path):
    save_foreign(tmp_path / "foreign", gptq, GPTQ, bits=4)
    change_config(tmp_path / "foreign", lambda values: values.update(num_hidden_layers=1))
    seen = []
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: got codes of 7 linears that LlamaForCausalLM"):
        convert(tmp_path / "foreign", tmp_path / "out", progress=lambda *done: seen.append(done))
    assert not seen
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("to", ["rosaq", "compressed-tensors"])
def test_an_unknown_architecture_is_refused_before_anything_is_read(tmp_path, to):
    if to == "rosaq":
        save_foreign(tmp_path / "source", gptq, GPTQ, bits=4)
    else:
        save_rosaq(tmp_path / "source", default=LinearFormat(4, 32))
    change_config(tmp_path / "source", lambda values: values.update(model_type="palimpsest"))
    seen = []
    with pytest.raises(ValueError, match=r"config.json: got .*palimpsest.*, need a model that transformers has"):
        convert(tmp_path / "source", tmp_path / "out", to=to, progress=lambda *done: seen.append(done))
    assert not seen
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("pack", "name", "settings"),
    [
        (gptq, "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
        (awq, "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_settings_in_a_file_of_their_own_are_read(tmp_path, pack, name, settings):
    save_foreign(tmp_path / "foreign", pack, {}, bits=4)
    change_config(tmp_path / "foreign", lambda values: values.pop("quantization_config"))
    (tmp_path / "foreign" / name).write_text(json.dumps(settings))
    result = convert(tmp_path / "foreign", tmp_path / "out")
    assert (result.source_format, result.num_linears) == (pack.__name__, 14)
    assert rosaq.verify(tmp_path / "out").is_sound
    assert not (tmp_path / "out" / name).exists()


def test_what_is_no_checkpoint_to_convert_gets_told_what_to_do(tmp_path):
    save_foreign(tmp_path / "dense", gptq, {}, bits=4)
    with pytest.raises(ValueError, match=r"got a dense checkpoint, need .*, or `rosaq quantize`, which takes dense"):
        convert(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "dense" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"source: got .*dense without config.json, need a model directory"):
        convert(tmp_path / "dense", tmp_path / "out")
