"""rosaq.fused_gemm against torch's linear on the CPU, one [n, k] weight, a row per m. Writes JSON.

    python benchmarks/bench_cpu.py --m 1 8 64 --threads 2 --out results.json

A row: median milliseconds of torch linear in x's dtype and in float32 and bfloat16, of fused_gemm for 4 and 3 bits,
their ratios, and per bit width the share of the measured read bandwidth that reading the packed weight once would be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine, medians, read_bandwidth, rotate_copies
from torch import Tensor
from torch.nn import functional

from rosaq import _C, ops

CACHE_BYTES = 96 << 20  # weights in rotation: three times the 32 MB of a common last-level cache


def packed_weight(n: int, k: int, bits: int, group_size: int) -> Tensor:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    groups = k // group_size
    zeros = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    return ops.prepack(ops.pack(codes, bits), (torch.rand(n, groups) / k**0.5).half(), zeros, bits)


def quantised_call(x: Tensor, n: int, k: int, bits: int, group_size: int) -> tuple[Callable[[], Tensor], int]:
    """A call of fused_gemm that takes another copy of the weight every time, and the bytes of one copy."""
    packed = packed_weight(n, k, bits, group_size)
    copies = rotate_copies(packed.clone, packed.numel(), CACHE_BYTES)
    sizes = {"out_features": n, "bits": bits, "group_size": group_size, "symmetric": False}
    return lambda: ops.fused_gemm(x, next(copies), **sizes), packed.numel()


def dense_call(x: Tensor, n: int, k: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    weight, x = torch.randn(n, k, dtype=dtype), x.to(dtype)
    copies = rotate_copies(weight.clone, weight.nbytes, CACHE_BYTES)
    return lambda: functional.linear(x, next(copies))


def measure(m: int, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """One row of the result."""
    n, k, dtype = args.n, args.k, getattr(torch, args.dtype)
    x = torch.randn(m, k).to(dtype)
    names = {args.dtype, "float32", "bfloat16"}
    calls = {f"torch_{name}": dense_call(x, n, k, getattr(torch, name)) for name in sorted(names)}
    sizes = {}
    for bits in (4, 3):
        calls[f"int{bits}"], sizes[f"int{bits}"] = quantised_call(x, n, k, bits, args.group_size)
    seconds = medians(calls, args.rounds, args.min_seconds)
    row: dict[str, Any] = {"m": m, "ms": {name: round(s * 1e3, 4) for name, s in seconds.items()}}
    for name, size in sizes.items():
        row[f"{name}_speedup"] = {
            dense: round(seconds[dense] / seconds[name], 3) for dense in calls if dense not in sizes
        }
        row[f"{name}_bandwidth_share"] = round(size / seconds[name] / bandwidth, 3)
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, choices=_C.available_isas())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-seconds", type=float, default=0.3, help="per m")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.isa is not None:
        _C.set_isa(args.isa)
    bandwidth = read_bandwidth()
    shape = {"n": args.n, "k": args.k, "group_size": args.group_size, "x_dtype": args.dtype}
    result = {"machine": machine(), "shape": shape, "read_gb_per_s": round(bandwidth / 1e9, 1), "rows": []}
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    for m in args.m:
        row = measure(m, args, bandwidth)
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
