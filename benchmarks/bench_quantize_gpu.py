"""Seconds that quantising takes on a GPU, for blocks of a given shape. Writes JSON.

    PYTHONPATH=. python benchmarks/bench_quantize_gpu.py --out quantize.json [--shape 8b] [--presets fast default]

Weights are random and the text is what Python carries, one token a byte: only time is measured. Every run has a first
block, whose time holds what a run does once (reading the text, the sweep that shares bits out), and a second one,
which is what each block more costs. `fast` is run once more with the loops over columns in place of the ops for panels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_decode_gpu import SHAPES
from gpu_timing import gpu
from timing import machine
from transformers import AutoModelForCausalLM, LlamaConfig

import rosaq
from rosaq import ops
from tests.models import byte_level_tokenizer

BLOCKS = 2


def dense_model(shape: str, directory: Path, device: str) -> Path:
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": BLOCKS})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def seconds(model: Path, output: Path, preset: str, device: str) -> dict[str, Any]:
    """Of a run, by what is done."""
    done: dict[str, list[float]] = {}

    def mark(event: rosaq.ProgressEvent) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        done.setdefault(event.stage, []).append(event.seconds)

    result = rosaq.quantize(model, output, preset=preset, device=device, progress=mark, force=True)
    first, second = done["blocks"]
    axes = done["axes"][-1]
    fitted = done["fit"][-1]
    return {
        "preset": preset,
        "axes": axes,
        "fitting": fitted - axes,
        "first_block": first - fitted,
        "second_block": second - first,
        "tuning_the_model": done["tuning"][-1] - second if "tuning" in done else 0.0,
        "all": result.seconds,
        "peak_gpu_memory_bytes": result.peak_gpu_memory_bytes,
        "bits_per_weight": result.bits_per_weight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--presets", nargs="+", default=["fast", "default"])
    parser.add_argument("--device", default="cuda", help="cpu for a dry run, with --shape tiny")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = dense_model(args.shape, Path(folder) / "dense", args.device)
        for preset in args.presets:
            rows.append({"panels": "ops"} | seconds(model, Path(folder) / "out", preset, args.device))
            print(rows[-1], flush=True)
        if "fast" in args.presets:
            ops.has_kernels = lambda _: False
            rows.append({"panels": "loops"} | seconds(model, Path(folder) / "out", "fast", args.device))
            print(rows[-1], flush=True)
    where = gpu() if args.device != "cpu" else None
    setting = {"shape": SHAPES[args.shape] | {"num_hidden_layers": BLOCKS}}
    args.out.write_text(json.dumps({"gpu": where, "machine": machine(), "setting": setting, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
