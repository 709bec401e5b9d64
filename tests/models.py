"""Tiny random models and a byte-level tokenizer, built in code: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from rosaq.checkpoint import write_shards
from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.layout import pack, zero_bytes
from rosaq.specs import CalibrationSpec

VOCAB_SIZE = 264

# A calibration that takes a tiny model a second: arguments of `rosaq.quantize`.
TEXT = ["The quick brown fox jumps over the lazy dog, again and again, until the hounds give up. " * 40]
SMALL: dict[str, Any] = {
    "group_size": 32,
    "calibration": TEXT,
    "spec": CalibrationSpec(num_sequences=6, sequence_length=48, batch_size=4),
}
TUNED: dict[str, Any] = SMALL | {"preset": "best"}  # block by block, and as a whole


class ByteTokenizer:
    """The least a tokenizer can be: one token per UTF-8 byte."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A real fast tokenizer of 256 byte symbols and an end-of-text token; no merges, so it needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{symbol: number for number, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


# Two layers, hidden 64, 4:2 heads, weights of a size that gives logits worth comparing.
TINY: dict[str, Any] = {
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


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of the sizes `TINY`, some of them changed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()


def tiny_mistral(seed: int = 0, **changes: Any) -> MistralForCausalLM:
    """As `tiny_llama`, of the Mistral family (no sliding window unless asked for)."""
    torch.manual_seed(seed)
    config = tiny_llama(seed, **changes).config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        config.pop(key, None)
    return MistralForCausalLM(MistralConfig(**({"sliding_window": None} | config))).eval()


def save_dense(directory: Path, model: torch.nn.Module | None = None) -> Path:
    """Save `model` (a tiny Llama where None) in float16 with the byte-level tokenizer; returns `directory`."""
    (model or tiny_llama()).half().save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def random_linear(fmt: LinearFormat, n: int, k: int, seed: int, *, bias: bool = False) -> dict[str, torch.Tensor]:
    """Disk-layout tensors of a random [n, k] linear whose effective weight has the size of a trained one. The zero
    points of every other row lie between two codes."""
    generator = torch.Generator().manual_seed(seed)
    groups, r, mid = fmt.groups_of(k), fmt.num_salient, 2 ** (fmt.bits - 1)
    codes = torch.randint(0, 2**fmt.bits, (n, k), generator=generator, dtype=torch.uint8)
    index = torch.randperm(k, generator=generator)[:r]
    codes[:, index] = mid
    tensors = {
        "qweight": pack(codes, fmt.bits),
        "scales": ((0.5 + torch.rand(n, groups, generator=generator)) / mid / k**0.5).half(),
        "zeros": zero_bytes((mid - torch.arange(n) % 2 / 2)[:, None].expand(n, groups)),
        "salient_weight": (torch.randn(n, r, generator=generator) / k**0.5).half(),
        "salient_index": index.to(torch.int32),
        "salient_basis": torch.linalg.qr(torch.randn(k, max(r, 1), generator=generator))[0].half(),
    }
    if fmt.rotation_size:
        blocks = torch.randn(fmt.rotation_blocks, fmt.rotation_size, fmt.rotation_size, generator=generator)
        tensors["rotation"] = torch.linalg.qr(blocks)[0].half()
    tensors["bias"] = (torch.randn(n, generator=generator) * 0.1).half()
    return {name: tensors[name] for name in fmt.tensor_shapes(k, n, bias=bias)}


def save_rosaq(
    directory: Path,
    model: torch.nn.Module | None = None,
    *,
    default: LinearFormat,
    modules: dict[str, LinearFormat] | None = None,
) -> Path:
    """A rosaq checkpoint with random codes in place of `model`'s linears (a tiny Llama where None)."""
    model = model or tiny_llama()
    config = CheckpointConfig(default, modules or {}, recipe="random")
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    for seed, (name, module) in enumerate(model.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        n, k = tensors.pop(f"{name}.weight").shape
        made = random_linear(config.format_of(name), n, k, seed, bias=module.bias is not None)
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    write_shards(directory, sorted(tensors.items()))
    values = model.config.to_dict() | {"dtype": "float16", "quantization_config": config.to_dict()}
    (directory / "config.json").write_text(json.dumps(values, default=str))
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Lets `change` edit what config.json holds."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def vandalise(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the checkpoint's dictionary of tensors, on disk."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
