"""Tiny random models and a byte-level tokenizer, built in code: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 264


class ByteTokenizer:
    """The least a tokenizer can be: one token per UTF-8 byte."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("utf-8"))}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A real fast tokenizer of 256 byte symbols and an end-of-text token; no merges, so it needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{symbol: number for number, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden 64, 4:2 heads, weights of a size that gives logits worth comparing."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def tiny_mistral(seed: int = 0, **changes: Any) -> MistralForCausalLM:
    """As `tiny_llama`, of the Mistral family (no sliding window)."""
    torch.manual_seed(seed)
    config = tiny_llama(seed, **changes).config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        config.pop(key, None)
    return MistralForCausalLM(MistralConfig(**(config | {"sliding_window": None}))).eval()


def save_dense(directory: Path, model: torch.nn.Module | None = None) -> Path:
    """Save `model` (a tiny Llama where None) in float16 with the byte-level tokenizer; returns `directory`."""
    (model or tiny_llama()).half().save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory
