"""transformers: load, run, generate and save rosaq checkpoints; refuse the ones it would only warn about."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    pipeline,
)

from rosaq.checkpoint import total_bytes
from rosaq.config import LinearFormat
from rosaq.integrations.transformers import RosaqConfig, RosaqHfQuantizer
from rosaq.integrations.transformers_checks import check_offloaded
from rosaq.linear import PACKED_NAMES, RosaqLinear
from tests.models import save_rosaq, tiny_mistral, vandalise
from tests.tolerances import assert_as_good_as, assert_same_function

FORMATS = {
    "int3-salient": {"default": LinearFormat(3, 32, num_salient=4)},
    "int4-symmetric": {"default": LinearFormat(4, 64, symmetric=True)},
    "mixed": {
        "default": LinearFormat(3, 32),
        "modules": {"mlp.down_proj": LinearFormat(4, 32, rotation_blocks=1, rotation_size=32)},
    },
}
INPUT_IDS = torch.arange(24).view(2, 12)


@pytest.fixture(params=FORMATS, name="checkpoint")
def _checkpoint(request, tmp_path):
    return save_rosaq(tmp_path / "model", **FORMATS[request.param])


@pytest.fixture(name="salient_checkpoint")
def _salient_checkpoint(tmp_path):
    return save_rosaq(tmp_path / "model", **FORMATS["int3-salient"])


@torch.no_grad()
def logits_of(model):
    return model(INPUT_IDS).logits


def dense_twin(checkpoint, dtype):
    """The model of the same weights as ordinary linears of `dtype`, to judge by."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize(dtype).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loaded_model_computes_what_its_dense_twin_computes(checkpoint, dtype):
    logits = logits_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype))
    exact, plain = dense_twin(checkpoint, torch.float64), dense_twin(checkpoint, dtype)
    assert not any(isinstance(module, RosaqLinear) for module in exact.modules())
    assert_as_good_as(logits, logits_of(plain), logits_of(exact))


def test_linears_are_swapped_packed_and_the_head_is_not(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    layers = [module for module in model.modules() if isinstance(module, RosaqLinear)]
    assert len(layers) == 14
    assert all(layer.packed is not None and layer.qweight is None for layer in layers)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_resave_is_bit_exact_in_any_dtype(checkpoint, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert logits_of(model).dtype == dtype
    model.save_pretrained(tmp_path / "again")
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        if ".self_attn." in name or ".mlp." in name:
            assert after[name].dtype == tensor.dtype, name
            assert torch.equal(after[name], tensor), name
    config = [json.loads((d / "config.json").read_text()) for d in (checkpoint, tmp_path / "again")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits_of(again), logits_of(model))


def test_generate_with_cache_equals_generate_without(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(INPUT_IDS, use_cache=True, **kwargs)
    assert with_cache.shape == (2, 20)
    assert torch.equal(with_cache, model.generate(INPUT_IDS, use_cache=False, **kwargs))


def test_base_model_and_other_families_load(tmp_path):
    AutoModel.from_pretrained(save_rosaq(tmp_path / "llama", **FORMATS["mixed"]))
    mistral = save_rosaq(tmp_path / "mistral", tiny_mistral(), **FORMATS["mixed"])
    assert isinstance(AutoModelForCausalLM.from_pretrained(mistral).model.layers[0].mlp.up_proj, RosaqLinear)


def test_other_classes_find_the_formats_of_single_linears(tmp_path):
    """Without its head a model's modules have shorter names than the checkpoint's, and formats go by names."""
    own = {f"model.layers.1.{name}": LinearFormat(4, 64, num_salient=2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    path = save_rosaq(tmp_path / "model", default=LinearFormat(3, 32), modules=own)
    whole, base = AutoModelForCausalLM.from_pretrained(path), AutoModel.from_pretrained(path)
    assert base.layers[1].mlp.up_proj.format == own["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        assert torch.equal(base(INPUT_IDS).last_hidden_state, whole.model(INPUT_IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    assert type(classifier.score) is torch.nn.Linear
    assert isinstance(classifier.model.layers[0].mlp.up_proj, RosaqLinear)


@pytest.mark.parametrize("grad", [True, False])
def test_model_compiles_whole(salient_checkpoint, grad):
    model = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_nothing_pretends_to_have_a_gradient(salient_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(salient_checkpoint)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(INPUT_IDS).logits.requires_grad


def test_the_gradient_of_the_embedded_text_is_that_of_the_dense_twin(salient_checkpoint):
    """Through q/k/v and gate/up, which share calls otherwise, and all blocks; what prompt tuning needs."""
    embedded = torch.randn(2, 12, 64)
    gradients = []
    for model in (
        AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32),
        dense_twin(salient_checkpoint, torch.float32),
    ):
        leaf = embedded.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.log_softmax(-1)[..., 7].sum().backward()
        gradients.append(leaf.grad)
    assert_same_function(*gradients)


def test_memory_footprint_is_that_of_the_file(salient_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(salient_checkpoint)
    # Headers and padding of 14 tiny packed linears; a second copy of the codes would be far more.
    assert model.get_memory_footprint() <= 1.25 * total_bytes(salient_checkpoint)


def test_device_map_auto_computes_the_same(salient_checkpoint):
    whole = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32)
    placed = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32, device_map="auto")
    assert torch.equal(logits_of(placed).cpu(), logits_of(whole))


def test_generate_with_a_static_cache(salient_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(INPUT_IDS, **kwargs)
    # Static caches make transformers compile the decoding step where it can; eager keeps the test short.
    static = model.generate(INPUT_IDS, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(static, want)


def test_pipeline_continues_a_text(salient_checkpoint):
    generator = pipeline("text-generation", model=str(salient_checkpoint))
    (answer,) = generator("The fox", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("The fox")


def test_one_compilation_serves_every_number_of_tokens(salient_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 17, 300):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_disk_offload_computes_the_same(salient_checkpoint, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        salient_checkpoint,
        dtype=torch.float32,
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    for _ in range(2):
        assert torch.equal(logits_of(offloaded), logits_of(whole))
    slopes = []
    for model in (whole, offloaded):
        leaf = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        slopes += torch.autograd.grad(model(inputs_embeds=leaf).logits.square().sum(), leaf)
    assert torch.equal(*slopes)
    with pytest.raises(ValueError, match=r"layers\.1\..*: got a model with offloaded tensors to dequantise"):
        offloaded.dequantize()


@pytest.mark.parametrize("path", ["../{name}", "more/../../{name}", "./../{name}/."])
def test_a_path_of_the_users_own_may_lead_out_and_in_again(path, salient_checkpoint, monkeypatch):
    here = salient_checkpoint.parent / "here"
    (here / "more").mkdir(parents=True)
    monkeypatch.chdir(here)
    want = logits_of(AutoModelForCausalLM.from_pretrained(salient_checkpoint, dtype=torch.float32))
    got = AutoModelForCausalLM.from_pretrained(path.format(name=salient_checkpoint.name), dtype=torch.float32)
    assert torch.equal(logits_of(got), want)


def test_codes_that_offloading_has_changed_are_an_error():
    module = SimpleNamespace(_hf_hook=SimpleNamespace(weights_map={"qweight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"up.qweight: got torch.float32 from the offload folder, need int32"):
        check_offloaded("up", module)


# --- refusals -------------------------------------------------------------------------------------------------------

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("tensor", [*PACKED_NAMES, "salient_weight", "salient_index"])
def test_missing_tensor_is_an_error_that_names_the_module(salient_checkpoint, tensor):
    vandalise(salient_checkpoint, lambda tensors: tensors.pop(f"{Q_PROJ}.{tensor}"))
    with pytest.raises(ValueError, match=f"{Q_PROJ}.{tensor}: got no such tensor"):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


@pytest.mark.parametrize(
    ("tensor", "change", "error"),
    [
        ("scales", lambda t: t.fill_(torch.nan), f"{Q_PROJ}.scales: got 128 NaN or Inf"),
        ("salient_index", lambda t: t.fill_(64), f"{Q_PROJ}.salient_index"),
        ("qweight", lambda t: t.to(torch.int64), f"{Q_PROJ}.qweight: got int64"),
    ],
)
def test_unsound_tensor_is_an_error_that_names_the_module(salient_checkpoint, tensor, change, error):
    name = f"{Q_PROJ}.{tensor}"
    vandalise(salient_checkpoint, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match=error):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


def test_wrong_shape_is_an_error(salient_checkpoint):
    name = f"{Q_PROJ}.scales"
    vandalise(salient_checkpoint, lambda tensors: tensors.update({name: tensors[name][:, :1].contiguous()}))
    with pytest.raises(ValueError, match=rf"{name}: got float16 \[64, 1\], need float16 \[64, 2\]"):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


def test_tensor_that_the_config_does_not_know_is_an_error(tmp_path):
    checkpoint = save_rosaq(tmp_path, **FORMATS["int4-symmetric"])
    name = f"{Q_PROJ}.zeros"
    vandalise(checkpoint, lambda tensors: tensors.update({name: torch.full((64, 1), 7, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=rf"{name}: got uint8 \[64, 1\], need no such tensor"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_truncated_checkpoint_is_an_error(salient_checkpoint):
    path = salient_checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: got \d+ bytes, need \d+ by its header"):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


def test_pickle_is_never_read(salient_checkpoint):
    path = salient_checkpoint / "model.safetensors"
    torch.save(load_file(path), salient_checkpoint / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin: got a file that is not safetensors"):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


def test_index_may_not_leave_the_directory(salient_checkpoint):
    path = salient_checkpoint / "model.safetensors"
    outside = path.rename(salient_checkpoint.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(outside), "../outside.safetensors")}
    (salient_checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))
    with pytest.raises(ValueError, match=r"got file .*/../outside.safetensors, need plain file names inside"):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "version: got 3"),
        ({"version": None}, r"version: got none, .* give quantization_config=RosaqConfig"),
        ({"bits": 5}, "bits: got 5"),
        ({"colour": 1}, "unknown keys"),
        ({"bits": 4}, "got codes of 3 bits, need 4 by config.json"),
    ],
)
def test_foreign_config_is_an_error(salient_checkpoint, changes, message):
    path = salient_checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(salient_checkpoint)


def test_experts_that_stay_dense_are_told():
    """Those of a family that rosaq has no linears for, here because the configuration leaves them out."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    quantizer = RosaqHfQuantizer(RosaqConfig(4, 32, modules_to_not_convert=["experts"]), pre_quantized=False)
    with pytest.warns(UserWarning, match="expert tensors .* stay in 16 bits"):
        quantizer._process_model_before_weight_loading(model)
