"""llm-compressor's GPTQ or AWQ, run in its own environment; writes a compressed-tensors checkpoint.

Its weights are asymmetric, one scale and zero point per group; act-order "static", its default, costs no bits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, bits: int, group_size: int, observer: str) -> list[GPTQModifier | AWQModifier]:
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size, observer=observer
    )
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="calibration tokens, .npy, int64 [sequences, length]")
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=("gptq", "awq"), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--observer", default="memoryless_mse", help="how a group's range is found")
    arguments = parser.parse_args()

    if not torch.accelerator.is_available():
        # AWQ pins its cache for quicker copies to a GPU, which torch refuses without one; nothing else depends on it.
        IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    windows = np.load(arguments.windows)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rows = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    begin = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe(arguments.method, arguments.bits, arguments.group_size, arguments.observer),
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    print(f"quantised in {time.perf_counter() - begin:.0f} s")
    # float16 scales and norms, as a checkpoint for use would have; codes are integers and stay as they are.
    model.half().save_pretrained(arguments.output, save_compressed=True)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
