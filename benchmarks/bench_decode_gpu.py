"""Generating tokens on a GPU with a model of a given shape: 16-bit linears against INT4 and INT3. Writes JSON.

    python benchmarks/bench_decode_gpu.py --out decode.json [--batch 1 16 64] [--shape 7b]

Weights are random: only time is measured. One step (all blocks, the head, the choice of the next token) is a CUDA graph
over transformers' own model and static cache, replayed --tokens times after a prompt of 8, for every candidate alike;
so neither Python nor launches are part of a figure. INT3 and INT4: groups of 128, symmetric, and --salient channels of
every linear in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gpu_timing import copy_bandwidth, gpu, graph_of
from timing import machine
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from rosaq import RosaqLinear, ops
from rosaq.config import LinearFormat

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}
PROMPT, GROUP, ROUNDS = 8, 128, 3


def dense_model(shape: str, device: str) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.float16).eval()


def random_linear(linear: nn.Linear, bits: int, salient: int) -> RosaqLinear:
    """A quantised layer of the same size, its weights of about the same."""
    n, k = linear.weight.shape
    device = linear.weight.device
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device)
    size = float(linear.weight.detach().std()) / (2**bits / 12**0.5)
    tensors = {
        "qweight": ops.pack(codes, bits),
        "scales": torch.full((n, k // GROUP), size, device=device).half(),
        "salient_index": torch.randperm(k, device=device)[:salient].sort().values.int(),
        "salient_weight": linear.weight[:, :salient].half().clone(),
    }
    return RosaqLinear.from_tensors(tensors, LinearFormat(bits, GROUP, symmetric=True, num_salient=salient))


def quantise(model: Any, bits: int, salient: int) -> None:
    """Put a RosaqLinear in the place of every linear of every block."""
    for block in model.model.layers:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear | RosaqLinear)]:
            if isinstance(linear, RosaqLinear):
                like = nn.Linear(linear.in_features, linear.out_features, bias=False, device="cuda", dtype=torch.half)
            else:
                like = linear
            block.set_submodule(name, random_linear(like, bits, salient))


def linear_bytes(model: Any) -> int:
    """Of the blocks' linears, as they lie in memory."""
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear | RosaqLinear)]
    held = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    return sum(t.nbytes for t in held if t is not None)


@torch.no_grad()
def milliseconds_per_token(model: Any, batch: int, tokens: int) -> float:
    """Of a step that makes one token for each of `batch` sequences, the best of a few rounds of `tokens` steps."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + tokens + 2)
    prompt = torch.arange(PROMPT, device="cuda").expand(batch, PROMPT)
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    start = [layer.cumulative_length.clone() for layer in cache.layers]

    def step() -> torch.Tensor:
        chosen: torch.Tensor = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        return chosen

    graph = graph_of([lambda: token.copy_(step())])
    times = []
    for _ in range(ROUNDS):
        for layer, length in zip(cache.layers, start, strict=True):
            layer.cumulative_length.copy_(length)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(tokens):
            graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / tokens)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--salient", type=int, default=128)
    args = parser.parse_args()
    model = dense_model(args.shape, "cuda")
    record: dict[str, Any] = {
        "gpu": gpu(),
        "machine": machine(),
        "copy_bandwidth": copy_bandwidth(),
        "setting": {"shape": SHAPES[args.shape], "tokens": args.tokens, "group": GROUP, "salient": args.salient},
        "rows": [],
    }
    for name, bits in {"fp16": 16, "int4": 4, "int3": 3}.items():
        if bits < 16:
            quantise(model, bits, args.salient)
            torch.cuda.empty_cache()
        for batch in args.batch:
            ms = milliseconds_per_token(model, batch, args.tokens)
            row = {"linears": name, "batch": batch, "ms_per_step": ms, "tokens_per_second": 1e3 * batch / ms}
            record["rows"].append(row | {"linear_bytes": linear_bytes(model)})
            print(f"{name} batch {batch}: {ms:.2f} ms a step, {1e3 * batch / ms:.0f} tokens/s", flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
