"""Perplexity and KL against bits per weight, from the JSON of run.py: `python plot.py RESULTS.json PLOT.svg`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

MARKERS = {"rosaq": "o", "llm-compressor": "s", "auto-round": "^", "llama.cpp": "D"}
MEASURES = {"ppl": "perplexity", "kl": "mean KL to float16, nats"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path)
    arguments = parser.parse_args()

    record = json.loads(arguments.results.read_text())
    rows = [row for row in record["rows"] if row["tool"] is not None]
    float16 = next(row for row in record["rows"] if row["tool"] is None)
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(11, 4.5), layout="constrained")
    for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for tool, marker in MARKERS.items():
            own = [row for row in rows if row["tool"] == tool]
            ax.scatter(
                [row["bits_per_weight"] for row in own],
                [row["evaluation"][measure] for row in own],
                marker=marker,
                label=tool,
            )
        for row in rows:
            position = (row["bits_per_weight"], row["evaluation"][measure])
            ax.annotate(row["name"], position, xytext=(4, 3), textcoords="offset points", fontsize=7)
        ax.set(xlabel="bits per weight of the linears, everything counted", ylabel=label, yscale="log")
        ax.grid(visible=True, which="both", alpha=0.2)
    axes[0].axhline(float16["evaluation"]["ppl"], color="gray", linestyle=":", label="float16")
    axes[0].legend()
    figure.suptitle(f"{record['model']}: {record['evaluation']}", fontsize=9)
    figure.savefig(arguments.plot)


if __name__ == "__main__":
    main()
