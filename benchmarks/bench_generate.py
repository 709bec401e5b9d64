"""Tokens per second of greedy decoding on the CPU: torch against rosaq, its calls shared or not, its head in 16 or 4
bits, its step compiled or not. Writes JSON.

    python benchmarks/bench_generate.py MODEL --threads 2 --out results.json

With --llama-library (as bench_ggml.py's) and --gguf, llama.cpp takes part: GGUF files of the same model, such as
accuracy/rival_llamacpp.py makes (its head in 16 bits, or with --low-bit-head as llama.cpp's own tool leaves it).
MODEL is a dense checkpoint; INT4 is rounded to nearest while loading, since only time is measured. The candidates take
turns; a round generates --tokens tokens after a prompt of 8; the figure is the median round's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llamacpp import Ggml, Llama
from timing import PAUSE, machine, medians
from transformers import AutoModelForCausalLM

from rosaq import QuantSpec, RosaqLinear
from rosaq.integrations.transformers import RosaqConfig
from rosaq.integrations.transformers_decoding import compiled_step

AGREED = 8  # first tokens that have to be the same, compiled or not


def load(
    path: Path, dtype: torch.dtype, group_size: int | None, *, shared: bool = True, low_bit_head: bool = False
) -> Any:
    """The dense model where group_size is None, else INT4, that of the head included if asked for."""
    config = None if group_size is None else RosaqConfig(bits=4, group_size=group_size)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).eval()
    for module in () if shared else model.modules():
        if getattr(module, "siblings", None) is not None:
            module.siblings.part()
    if low_bit_head:
        head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False, dtype=torch.float32)
        head.weight = torch.nn.Parameter(model.lm_head.weight.float())
        model.lm_head = RosaqLinear.from_linear(head, None, QuantSpec(bits=4, group_size=group_size, method="rtn"))
    model.generation_config.eos_token_id = None  # nobody stops early
    return model


def llama_calls(args: argparse.Namespace, prompt: list[int]) -> dict[str, Callable[[], object]]:
    """Greedy decoding of every GGUF file, under its name."""
    if not args.gguf:
        return {}
    ggml = Ggml(args.llama_library, args.threads)
    models = {path.stem: Llama(ggml, args.llama_library, path, args.threads) for path in args.gguf}
    return {
        f"llamacpp_{name}": lambda model=model: model.generate(prompt, args.tokens) for name, model in models.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--llama-library", type=Path, default=None, help="folder with libllama, v0.5.0")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="files for llama.cpp, need --llama-library")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.gguf and args.llama_library is None:
        raise SystemExit(f"--llama-library: got none with {len(args.gguf)} GGUF files, need a folder")
    torch.set_num_threads(args.threads)
    models = {
        "torch_bfloat16": load(args.model, torch.bfloat16, None),
        "int4_bfloat16_each_alone": load(args.model, torch.bfloat16, args.group_size, shared=False),
        "int4_bfloat16": load(args.model, torch.bfloat16, args.group_size),
        "int4_bfloat16_head4": load(args.model, torch.bfloat16, args.group_size, low_bit_head=True),
    }
    prompt = torch.arange(100, 108)[None]

    def generate(model: Any, **further: Any) -> torch.Tensor:
        ids: torch.Tensor = model.generate(prompt, do_sample=False, max_new_tokens=args.tokens, **further)
        return ids

    calls: dict[str, Callable[[], Any]] = {name: lambda model=model: generate(model) for name, model in models.items()}
    for name in ("torch_bfloat16", "int4_bfloat16", "int4_bfloat16_head4"):
        calls[f"{name}_compiled"] = lambda model=models[name]: generate(model, **compiled_step(model))
    wanted = calls["int4_bfloat16"]()
    if not torch.equal(found := calls["int4_bfloat16_each_alone"](), wanted):
        raise SystemExit(f"int4_bfloat16_each_alone: got {found.tolist()}, need {wanted.tolist()}")
    # Compiled operations round at other places, so that after some tokens another one may be the likeliest.
    same = int((calls["int4_bfloat16_compiled"]() == wanted).cumprod(-1).sum()) - prompt.shape[1]
    if same < min(args.tokens, AGREED):
        raise SystemExit(f"int4_bfloat16_compiled: got {same} tokens as without compiling, need {AGREED}")
    calls |= llama_calls(args, prompt[0].tolist())
    seconds = medians(calls, args.rounds, pause=PAUSE)
    rates = {name: round(args.tokens / s, 1) for name, s in seconds.items()}
    setting = {
        "model": args.model.name,
        "group_size": args.group_size,
        "tokens": args.tokens,
        "same_when_compiled": same,
    }
    result = {"machine": machine(), "setting": setting, "tokens_per_second": rates}
    print(json.dumps(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
