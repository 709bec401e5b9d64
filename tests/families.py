"""A tiny random model of every family, with random gains and biases and a few outlier channels to rotate away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import TINY, byte_level_tokenizer

_COMMON: dict[str, Any] = TINY | {"pad_token_id": None}
# What a family's config needs beside the common part. A new family is one line here.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
OUTLIERS = (3, 17)  # channels of the residual stream that are ten times as large as the others


@torch.no_grad()
def tiny_family(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers of width 64. Gains, biases and norms of q and k are random: ones and zeros would hide mistakes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(_COMMON | CHANGES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn_like(parameter)
    model.get_input_embeddings().weight[:, OUTLIERS] *= 10
    return model


def save_family(directory: Path, model: PreTrainedModel, **options: Any) -> Path:
    """Save `model` in float16 with the byte-level tokenizer; returns `directory`."""
    model.half().save_pretrained(directory, **options)
    byte_level_tokenizer().save_pretrained(directory)
    return directory
