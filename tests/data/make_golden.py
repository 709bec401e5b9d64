"""Makes tests/data/golden: a checkpoint of format version 1 and the logits it must give, for ever.

Run once per format version (`python -m tests.data.make_golden`) and never again: what is committed guards everybody's
checkpoints against a change of the format. One block, every kind of linear, in a mixture of formats.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rosaq.config import LinearFormat
from tests.models import save_rosaq, tiny_llama

GOLDEN = Path(__file__).parent / "golden"
INPUT_IDS = torch.arange(16).view(2, 8)
SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "attention_bias": True}
FORMATS = {
    "default": LinearFormat(3, 32, num_salient=3),
    "modules": {
        "mlp.down_proj": LinearFormat(4, 64, symmetric=True, rotation_blocks=1, rotation_size=32),
        "self_attn.o_proj": LinearFormat(4, -1, num_salient=2, salient="basis"),
        "mlp.up_proj": LinearFormat(3, 64, rotation_blocks=2, rotation_size=32),
    },
}


@torch.no_grad()
def main() -> None:
    save_rosaq(GOLDEN, tiny_llama(**SIZES), **FORMATS)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (GOLDEN / name).unlink(missing_ok=True)
    # In float64 on dense weights: what the checkpoint means, whatever kernel runs it.
    model = AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).dequantize(torch.float64).double()
    save_file({"logits": model(INPUT_IDS).logits.float()}, GOLDEN / "expected" / "logits.safetensors")


if __name__ == "__main__":
    (GOLDEN / "expected").mkdir(parents=True, exist_ok=True)
    main()
