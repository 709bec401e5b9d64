"""AutoRound (signed gradient descent on rounding and ranges, block by block) in its own environment; writes a GPTQ
checkpoint: asymmetric, one scale and zero point per group."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="calibration tokens, .npy, int64 [sequences, length]")
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()

    windows = torch.from_numpy(np.load(arguments.windows))
    begin = time.perf_counter()
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=False,
        iters=arguments.iterations,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
    )
    # It writes into a folder below the one that it is given, named after the model.
    staging = arguments.output.with_name(f"{arguments.output.name}.partial")
    rounding.quantize_and_save(str(staging), format="auto_gptq")
    next(staging.rglob("config.json")).parent.rename(arguments.output)
    print(f"quantised in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
