"""rosaq.fused_gemm on a GPU against cuBLAS fp16, torch's int4 kernel and those of gpu_rivals.py. Writes JSON.

    python benchmarks/bench_gemm.py --out gemm.json [--shapes 8192x8192 ...] [--m 1 8 16 ...]

A row: microseconds per call (graph replay, median, weights rotated through at least 4x L2), the bytes that a call has
to move, and the share of the copy bandwidth measured in the same run that moving them at that time would be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_rivals
import torch
from gpu_timing import CALLS_PER_GRAPH, copies_needed, copy_bandwidth, gpu, median_us
from timing import machine
from torch import Tensor
from torch.nn import functional

from rosaq import ops

SHAPES = ["4096x4096", "14336x4096", "4096x14336", "8192x8192"]  # n x k
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
GROUP = 128
Calls = list[Callable[[], object]]


def rotated(make: Callable[[], Callable[[], object]], bytes_each: int) -> Calls:
    """Calls that take turns over copies of a weight."""
    copies = [make() for _ in range(min(copies_needed(bytes_each), 64))]
    return [copies[i % len(copies)] for i in range(max(CALLS_PER_GRAPH, len(copies)))]


def ours(
    x: Tensor,
    n: int,
    bits: int,
    *,
    group: int = GROUP,
    symmetric: bool = True,
    r: int = 0,
    basis: int = 0,
    rotation: int = 0,
) -> tuple[Calls, int]:
    """Calls of fused_gemm, and the bytes of one: packed weight, salient directions, rotation, x and y. group -1: one
    scale a row; r salient channels, or `basis` salient directions."""
    m, k = x.shape
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // group if group > 0 else 1, device="cuda") / k**0.5).half()
    zeros = None if symmetric else torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, device="cuda")
    packed = ops.prepack(ops.pack(codes, bits), scales, zeros, bits)
    extras: dict[str, Tensor] = {}
    if r:
        extras |= {"salient_weight": torch.randn(n, r, device="cuda").half()}
        extras |= {"salient_index": torch.randperm(k, device="cuda")[:r].int()}
    if basis:
        extras |= {"salient_weight": torch.randn(n, basis, device="cuda").half()}
        extras |= {"salient_basis": torch.linalg.qr(torch.randn(k, basis, device="cuda")).Q.half().contiguous()}
    if rotation:
        block = torch.linalg.qr(torch.randn(rotation, rotation, device="cuda")).Q.half()
        extras["rotation"] = block[None]
    sizes = {"out_features": n, "bits": bits, "group_size": group, "symmetric": symmetric}

    def make() -> Callable[[], object]:
        own, own_extras = packed.clone(), {name: tensor.clone() for name, tensor in extras.items()}
        return lambda: ops.fused_gemm(x, own, **own_extras, **sizes)

    weights = packed.numel() + sum(tensor.nbytes for tensor in extras.values())
    return rotated(make, weights), weights + 2 * m * (k + n)


def cublas(x: Tensor, n: int) -> tuple[Calls, int]:
    weight = torch.randn(n, x.size(1), device="cuda", dtype=x.dtype)

    def make() -> Callable[[], object]:
        own = weight.clone()
        return lambda: functional.linear(x, own)

    return rotated(make, weight.nbytes), weight.nbytes + 2 * x.size(0) * (x.size(1) + n)


def aten_int4(x: Tensor, n: int) -> tuple[Calls, int]:
    """torch's own int4 kernel, which knows bfloat16 only."""
    k, wide = x.size(1), x.bfloat16()
    nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    scales = torch.rand(k // GROUP, n, 2, device="cuda").bfloat16()

    def make() -> Callable[[], object]:
        own = packed.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm(wide, own, GROUP, scales)

    return rotated(make, packed.nbytes), packed.nbytes + scales.nbytes + 2 * x.size(0) * (k + n)


def row(n: int, k: int, m: int, bandwidth: float, rivals: Callable[[Tensor, int], dict[str, Any]]) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda").half()
    others = {name: (rotated(make, size), size + 2 * m * (k + n)) for name, (make, size) in rivals(x, n).items()}
    made = {
        "cublas_fp16": cublas(x, n),
        "aten_int4": aten_int4(x, n),
        "int4": ours(x, n, 4),
        "int3": ours(x, n, 3),
        "int3_asym": ours(x, n, 3, symmetric=False),
        "int3_salient128": ours(x, n, 3, r=128),
        "int3_rotation128": ours(x, n, 3, rotation=128),
        # As the default recipe makes them: q/k/v, gate/up, mostly without channels in 16 bits; down_proj.
        "int3_rows": ours(x, n, 3, group=-1, symmetric=False),
        "int3_rows_salient16": ours(x, n, 3, group=-1, symmetric=False, r=16),
        "int3_rows_rotation": ours(x, n, 3, group=-1, symmetric=False, rotation=32),
        # q/k/v and gate/up of a family whose norms do not let rotations fold.
        "int3_rows_basis": ours(x, n, 3, group=-1, symmetric=False, basis=2, rotation=32),
        **others,
    }
    us = median_us({name: calls for name, (calls, _) in made.items()})
    found: dict[str, Any] = {"n": n, "k": k, "m": m}
    for name, (_, num_bytes) in made.items():
        share = num_bytes / (us[name] * 1e-6) / bandwidth
        found[name] = {"us": us[name], "bytes": num_bytes, "share_of_copy_bandwidth": share}
    found["int3_over_cublas"] = us["cublas_fp16"] / us["int3"]
    found["int3_over_int4"] = us["int4"] / us["int3"]
    return found


def once(shapes: list[str], tokens: list[int]) -> None:
    for n, k in (map(int, shape.split("x")) for shape in shapes):
        for m in tokens:
            x = torch.randn(m, k, device="cuda").half()
            for bits in (4, 3):
                ours(x, n, bits)[0][0]()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--m", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rivals", action="store_true", help="those of gpu_rivals.py too, where they load")
    parser.add_argument("--once", action="store_true", help="INT4 and INT3 once each, for a profiler; no timing")
    args = parser.parse_args()
    if args.once:
        once(args.shapes, args.m)
        return
    bandwidth = copy_bandwidth()
    not_run = gpu_rivals.available() if args.rivals else {}

    def rivals(x: Tensor, n: int) -> dict[str, Any]:
        return gpu_rivals.prepared(x, n, GROUP, not_run) if args.rivals else {}

    rows = []
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        for m in args.m:
            rows.append(row(n, k, m, bandwidth, rivals))
            times = ", ".join(f"{name} {v['us']:.1f} us" for name, v in rows[-1].items() if isinstance(v, dict))
            print(f"{shape} m={m}: {times}", flush=True)
            record = {
                "gpu": gpu(),
                "machine": machine(),
                "copy_bandwidth": bandwidth,
                "group": GROUP,
                "not_run": not_run,
                "rows": rows,
            }
            if args.out is not None:
                args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
