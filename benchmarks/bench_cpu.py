"""rosaq.fused_gemm against torch's linear and torch's INT4 linear on the CPU, a row per shape and m. Writes JSON.

    python benchmarks/bench_cpu.py --shape 4096x4096 --m 1 8 64 --threads 2 --out results.json

A row: median milliseconds of torch's linear (bfloat16 and x's dtype), of aten::_weight_int4pack_mm_for_cpu, and of
fused_gemm for 4 and 3 bits in both precisions; the speedups; and the share of the measured read bandwidth that reading
the packed weight once would be. Candidates take turns in one process, reading memory alone (`read_bandwidth.cpp`) is
one of them. A turn is several calls in a row, as in a model, each of which reads another copy of its weight.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import PAUSE, MemoryRead, calls_in_a_row, medians, rotate_copies, write_rows
from torch import Tensor
from torch.nn import functional

import rosaq
from rosaq import _C, ops

CACHE_BYTES = 96 << 20  # weights in rotation: three times the 32 MB of a common last-level cache


Call = Callable[[], Tensor]


def quantised_call(x: Tensor, n: int, k: int, bits: int, group_size: int, **extras: Tensor) -> tuple[Call, int]:
    """A call of fused_gemm that takes another copy of the weight every time, and the bytes of one copy.

    Every copy is packed anew, so that it lies in memory as a loaded model's does.
    """
    qweight = ops.pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    scales = (torch.rand(n, k // group_size) / k**0.5).half()
    size = ops.prepack(qweight, scales, None, bits).numel()
    copies = rotate_copies(lambda: ops.prepack(qweight, scales, None, bits), size, CACHE_BYTES)
    sizes = {"out_features": n, "bits": bits, "group_size": group_size, "symmetric": True}
    return lambda: ops.fused_gemm(x, next(copies), **extras, **sizes), size


def in_int8(call: Call) -> Call:
    """The same call with 8-bit activations."""

    def run() -> Tensor:
        rosaq.set_cpu_precision("int8")
        try:
            return call()
        finally:
            rosaq.set_cpu_precision("exact")

    return run


def extra_calls(x: Tensor, n: int, k: int, group_size: int) -> dict[str, Call]:
    """INT4 with what may go with it: 32 salient directions by index, 32 and 2 by basis, a shared rotation."""
    salient, basis = torch.randn(n, 32).half(), torch.randn(k, 32).half()
    two = {"salient_weight": salient[:, :2].contiguous(), "salient_basis": basis[:, :2].contiguous()}
    variants: dict[str, dict[str, Tensor]] = {
        "int4_index32": {"salient_weight": salient, "salient_index": torch.arange(32, dtype=torch.int32)},
        "int4_basis32": {"salient_weight": salient, "salient_basis": basis},
        "int4_basis2": two,
    }
    if k % 128 == 0:
        rotation = torch.linalg.qr(torch.randn(1, 128, 128))[0].half()
        variants["int4_rotation128"] = {"rotation": rotation.contiguous()}  # as a checkpoint has it; qr does not
    return {name: quantised_call(x, n, k, 4, group_size, **extras)[0] for name, extras in variants.items()}


def aten_call(x: Tensor, n: int, k: int, group_size: int) -> Call:
    """torch's own INT4 linear, in bfloat16 (its only fast dtype)."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.rand(k // group_size, n, 2).bfloat16()
    copies = rotate_copies(packed.clone, packed.nbytes, CACHE_BYTES)
    x = x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(copies), group_size, scales_and_zeros)


def dense_call(x: Tensor, n: int, k: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    weight, x = torch.randn(n, k, dtype=dtype), x.to(dtype)
    copies = rotate_copies(weight.clone, weight.nbytes, CACHE_BYTES)
    return lambda: functional.linear(x, next(copies))


def measure(m: int, n: int, k: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result."""
    x = torch.randn(m, k).to(getattr(torch, args.dtype))
    names = sorted({args.dtype, "bfloat16"})
    calls = {f"torch_{name}": dense_call(x, n, k, getattr(torch, name)) for name in names}
    calls["aten_int4"] = aten_call(x, n, k, args.group_size)
    rivals, sizes = list(calls), {}
    for bits in (4, 3):
        calls[f"int{bits}"], sizes[f"int{bits}"] = quantised_call(x, n, k, bits, args.group_size)
        calls[f"int{bits}_int8"] = in_int8(calls[f"int{bits}"])
    ours = [name for name in calls if name not in rivals]
    calls |= extra_calls(x, n, k, args.group_size) if args.extras else {}
    read = MemoryRead()
    turns: dict[str, Callable[[], None]] = dict(read.turns)
    counts: dict[str, int] = {}
    for name, call in calls.items():
        turns[name], counts[name] = calls_in_a_row(call)
    passed = medians(turns, args.rounds, pause=PAUSE)
    seconds = {name: passed[name] / counts[name] for name in calls}
    bandwidth = read.bandwidth(passed)
    row: dict[str, Any] = {"n": n, "k": k, "m": m, "ms": {name: round(s * 1e3, 4) for name, s in seconds.items()}}
    row["speedup"] = {name: {rival: round(seconds[rival] / seconds[name], 2) for rival in rivals} for name in ours}
    row["read_gb_per_s"] = round(bandwidth / 1e9, 1)
    row["bandwidth_share"] = {name: round(size / seconds[name] / bandwidth, 2) for name, size in sizes.items()}
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="n x k, as 14336x4096")
    parser.add_argument("--extras", action="store_true", help="rows with salient directions and a rotation too")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"], help="of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None, choices=_C.available_isas())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.isa is not None:
        _C.set_isa(args.isa)
    setting = {"group_size": args.group_size, "x_dtype": args.dtype}
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape]
    cases = itertools.product(shapes, args.m)
    write_rows(setting, (measure(m, n, k, args) for (n, k), m in cases), args.out)


if __name__ == "__main__":
    main()
