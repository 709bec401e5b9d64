"""Time against tokens of one shape, with rivals and what reading the weight once would take, from bench_cpu's JSON.

python benchmarks/plot_cpu.py benchmarks/results/cpu-zen4-2threads.json --shape 4096x4096 --out docs/cpu.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import pyplot as plt

LINES = {
    "torch_bfloat16": ("torch bfloat16", "tab:gray", "--"),
    "aten_int4": ("torch INT4", "tab:brown", "--"),
    "int4": ("rosaq INT4", "tab:blue", "-"),
    "int3": ("rosaq INT3", "tab:green", "-"),
    "int4_int8": ("rosaq INT4, int8 activations", "tab:cyan", "-"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--shape", default="4096x4096", help="n x k, one of the result's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    n, k = map(int, args.shape.split("x"))
    rows = [row for row in result["rows"] if (row["n"], row["k"]) == (n, k)]
    if not rows:
        has = sorted({f"{row['n']}x{row['k']}" for row in result["rows"]})
        raise SystemExit(f"--shape: got {args.shape}, need one of {has}")
    tokens = [row["m"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, (label, color, style) in LINES.items():
        axes.plot(tokens, [row["ms"][name] for row in rows], style, color=color, marker="o", ms=4, label=label)
    for bits, color in ((4, "tab:blue"), (3, "tab:green")):
        read = n * k * (bits + 16 / result["setting"]["group_size"]) / 8 / rows[0]["read_gb_per_s"] / 1e6
        axes.axhline(read, color=color, lw=0.8, ls=":", label=f"reading INT{bits} once")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", xticks=tokens)
    axes.set_xticklabels([str(m) for m in tokens])
    axes.minorticks_off()
    threads, cpu = result["machine"]["threads"], result["machine"]["cpu"]
    axes.set_title(f"{args.shape}, bfloat16 x, {cpu}, {threads} threads", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
