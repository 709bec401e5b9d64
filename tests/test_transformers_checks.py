"""transformers: every quantised linear of the files has a place in the model, or loading is an error."""

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rosaq.config import LinearFormat
from tests.models import VOCAB_SIZE, change_config, random_linear, save_rosaq, vandalise

FORMAT = LinearFormat(3, 32, num_salient=4)
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(name="checkpoint")
def _checkpoint(tmp_path):
    return save_rosaq(tmp_path / "model", default=FORMAT)


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ("o_proj", "model.layers.0.self_attn.o_proj: got codes of 2 linears that have no place in"),
        (Q_PROJ, f"{Q_PROJ}: got codes of 1 linears that have no place in"),
    ],
)
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_codes_that_the_config_leaves_out_are_an_error(checkpoint, skipped, message, model_class):
    change_config(checkpoint, lambda config: config["quantization_config"]["modules_to_not_convert"].append(skipped))
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(checkpoint)


def test_layers_that_the_config_has_not_are_an_error(checkpoint):
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: got codes of 7 linears that have no place in Llama"):
        AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=1)


def test_codes_of_a_head_are_dropped_only_where_there_is_no_head(checkpoint):
    head = random_linear(FORMAT, VOCAB_SIZE, 64, seed=0)
    vandalise(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    vandalise(checkpoint, lambda tensors: tensors.update({f"lm_head.{key}": t for key, t in head.items()}))
    AutoModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="lm_head: got codes of 1 linears that have no place in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
