"""transformers: round a dense checkpoint to nearest while it is loaded, and save the result."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from rosaq.checkpoint import read_config
from rosaq.integrations.transformers import RosaqConfig
from rosaq.linear import RosaqLinear
from rosaq.specs import QuantSpec
from tests.models import save_dense, tiny_llama

INPUT_IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_dense_checkpoint_is_rounded_while_loading_and_saved(tmp_path, tied):
    dense = save_dense(tmp_path / "dense", tiny_llama(attention_bias=True, tie_word_embeddings=tied))
    config = RosaqConfig(bits=3, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=config)
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rounded = {name: m for name, m in model.named_modules() if isinstance(m, RosaqLinear)}
    assert len(rounded) == 14
    assert type(model.lm_head) is torch.nn.Linear
    for name, module in rounded.items():
        spec = QuantSpec(3, 32, method="rtn", clip=False)
        want = RosaqLinear.from_linear(original.get_submodule(name), spec=spec).state_dict()
        assert module.state_dict().keys() == want.keys()
        assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in want.items()), name

    model.save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved").default.bits == 3
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(tmp_path / "saved" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_linears_of_cross_attention_compute_alone(tmp_path):
    """Their q reads what the decoder made, k and v what the encoder made."""
    sizes = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64}
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(**sizes, **heads)).save_pretrained(tmp_path)
    config = RosaqConfig(bits=4, group_size=32)
    model = BartForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    rounded = [module for module in model.modules() if isinstance(module, RosaqLinear)]
    assert len(rounded) == 16
    assert all(module.siblings is None for module in rounded)


def test_modules_can_be_left_dense(tmp_path):
    dense = save_dense(tmp_path / "dense")
    config = RosaqConfig(bits=4, group_size=64, modules_to_not_convert=["lm_head", "model.layers.0"])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="auto")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, RosaqLinear)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_salient": 4}, "got num_salient 4 and rotation_size 0 for a dense checkpoint, need 0"),
        ({"rotation_blocks": 1, "rotation_size": 32}, "got num_salient 0 and rotation_size 32"),
        ({"group_size": 256}, "q_proj: group_size: got 256, need a divisor of in_features 64"),
    ],
)
def test_what_rounding_cannot_give_is_refused(tmp_path, changes, message):
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=RosaqConfig(**({"bits": 3, "group_size": 32} | changes))
        )


@pytest.mark.parametrize(
    ("values", "message"), [({"bits": 5}, "bits: got 5"), ({"colour": 1}, "unknown keys"), ({"version": 9}, "got 9")]
)
def test_config_refuses_what_it_does_not_know(values, message):
    with pytest.raises(ValueError, match=message):
        RosaqConfig(**values)


def test_disk_is_no_place_for_a_checkpoint_that_is_being_rounded(tmp_path):
    dense = save_dense(tmp_path / "dense")
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map: got 'disk' for a dense checkpoint"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=RosaqConfig(group_size=32), device_map=places)
