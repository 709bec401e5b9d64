"""What transformers pays for a rosaq checkpoint: seconds to load it, microseconds around the op. Writes JSON.

    python benchmarks/bench_serving.py DENSE QUANTISED --out results.json

Loading alternates between the two models, from a warm page cache; a row is the median, with the part of it that
rosaq adds (checks and packing). A decode step is one token through the model with a filled cache; "around the op" is
`RosaqLinear.forward` less a bare `torch.ops.rosaq.fused_gemm` of the same layer, times the linears of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import machine, medians
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from rosaq.linear import RosaqLinear

CALLS = 1000


def load(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def import_torch_seconds(rounds: int) -> dict[str, float]:
    """Fresh processes that do nothing but `import torch`, in turn with and without the entry point."""

    def start(autoload: str) -> None:
        env = {**os.environ, "ROSAQ_AUTOLOAD": autoload}
        subprocess.run([sys.executable, "-c", "import torch"], check=True, env=env)

    return medians({"with_autoload": lambda: start("1"), "without": lambda: start("0")}, rounds)


@torch.inference_mode()
def around_the_op(model: Any) -> dict[str, float]:
    """Microseconds of forward and of the bare op for the model's smallest linear, and the difference for all."""
    layers = [module for module in model.modules() if isinstance(module, RosaqLinear)]
    layer = min(layers, key=lambda module: module.in_features * module.out_features)
    fmt, x = layer.format, torch.randn(1, layer.in_features)
    tensors = (layer.packed, layer.salient_weight, layer.salient_index, layer.salient_basis, layer.rotation)
    sizes = (layer.out_features, fmt.bits, fmt.group_size_of(layer.in_features), fmt.symmetric)

    def module_calls() -> None:
        for _ in range(CALLS):
            layer(x)

    def op_calls() -> None:
        for _ in range(CALLS):
            torch.ops.rosaq.fused_gemm.default(x, *tensors, layer.bias, *sizes)

    seconds = medians({"module": module_calls, "op": op_calls}, rounds=15)
    each = {name: value / CALLS * 1e6 for name, value in seconds.items()}
    extra = each["module"] - each["op"]
    return {**each, "linears": len(layers), "extra_us_per_token": extra * len(layers)}


@torch.inference_mode()
def decode_ms(model: Any, tokens: int = 32) -> float:
    """Median milliseconds of one token with a filled cache."""
    ids = torch.arange(1, 33)[None]
    answer = model(ids, use_cache=True)
    samples = []
    for _ in range(tokens):
        start = time.perf_counter()
        answer = model(ids[:, :1], past_key_values=answer.past_key_values, use_cache=True)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("quantised")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    loading = medians({"dense": lambda: load(args.dense), "rosaq": lambda: load(args.quantised)}, args.rounds)
    model, dense = load(args.quantised), load(args.dense)
    result = {
        "load_seconds": loading | {"beyond_transformers": loading["rosaq"] - loading["dense"]},
        "import_torch_seconds": import_torch_seconds(args.rounds),
        "around_the_op_us": around_the_op(model),
        "decode_ms": {"dense": decode_ms(dense), "rosaq": decode_ms(model)},
        "machine": machine(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
