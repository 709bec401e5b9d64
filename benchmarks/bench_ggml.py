"""Time of a quantised linear against ggml's Q4_0 and Q4_K, on the CPU, in one run. Writes JSON. Opt-in: see --library.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    python benchmarks/bench_ggml.py --library package/bins/linux-x64 --shape 4096x4096 --threads 2 --out results.json

Every candidate multiplies x with copies of its weight that are together larger than the last-level cache; a turn is all
copies, one graph for ggml and one call each for rosaq, and the figure is the median turn by the number of copies. ggml
rounds activations to 8 bits, as `int4_int8` does. Where its build has a repacked order for a type, both orders run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cpu import CACHE_BYTES, Call, in_int8, quantised_call
from llamacpp import TYPES, Ggml
from timing import PAUSE, MemoryRead, medians, write_rows


def all_copies(call: Call, bytes_each: int) -> tuple[Callable[[], None], int]:
    copies = max(2, -(-CACHE_BYTES // bytes_each))

    def run() -> None:
        for _ in range(copies):
            call()

    return run, copies


def measure(m: int, n: int, k: int, args: argparse.Namespace, ggml: Ggml) -> dict[str, Any]:
    """One row of the result."""
    weight, x = torch.randn(n, k), torch.randn(m, k)
    want = x @ weight.T
    turns: dict[str, Callable[[], None]] = {}
    counts: dict[str, int] = {}
    opened = []
    for kind in TYPES:
        copies = max(2, -(-CACHE_BYTES // (n * k * 9 // 16)))  # both types have 4.5 bits a weight
        for place, products in enumerate(ggml.products(kind, weight, x, copies)):
            products()
            error = float((products.last() - want).norm() / want.norm())
            if error > 0.2:
                raise RuntimeError(f"{kind} {n}x{k}, {m} tokens: got relative error {error:.2f}, need less than 0.2")
            name = f"ggml_{kind.lower()}" + ("_repacked" if place else "")
            turns[name], counts[name] = products, copies
            opened.append(products)
    rivals = list(turns)
    for bits, group_size in ((4, args.group_size), (4, 32), (3, args.group_size)):
        call, size = quantised_call(x.bfloat16(), n, k, bits, group_size)
        name = f"int{bits}_g{group_size}"
        turns[name], counts[name] = all_copies(call, size)
        turns[f"{name}_int8"], counts[f"{name}_int8"] = all_copies(in_int8(call), size)
    read = MemoryRead()
    seconds = medians(read.turns | turns, args.rounds, pause=PAUSE)
    bandwidth = read.bandwidth(seconds)
    for products in opened:
        products.close()
    each = {name: seconds[name] / counts[name] for name in turns}
    best = min(each[name] for name in rivals)
    return {
        "n": n,
        "k": k,
        "m": m,
        "ms": {name: round(s * 1e3, 4) for name, s in each.items()},
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "speedup_over_best_ggml": {name: round(best / s, 2) for name, s in each.items() if name not in rivals},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="folder with libggml-base.so and its kin, v0.5.0")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="n x k, k a multiple of 256")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ggml = Ggml(args.library, args.threads)
    setting = {"group_size": args.group_size, "x_dtype": "bfloat16", "ggml": ggml.version}
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape]
    cases = itertools.product(shapes, args.m)
    write_rows(setting, (measure(m, n, k, args, ggml) for (n, k), m in cases), args.out)


if __name__ == "__main__":
    main()
