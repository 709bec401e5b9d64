"""Perplexity and KL against bits per weight, from the JSON of run.py: `python plot.py RESULTS.json PLOT.svg`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MARKERS = {"rosaq": "o", "llm-compressor": "s", "auto-round": "^", "llama.cpp": "D"}
FONT = 7  # points
MEASURES = {"ppl": "perplexity", "kl": "mean KL to float16, nats"}


def label_points(ax: Axes, points: dict[str, tuple[float, float]]) -> None:
    """A name beside every point, moved up where another name is, with a line to its point then."""
    to_points = 72 / ax.figure.dpi
    placed: list[tuple[float, float, float]] = []  # left and right end, height, in points
    places = {name: ax.transData.transform(point) * to_points for name, point in points.items()}
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        left, right, height = x + 6, x + 6 + FONT * 0.55 * len(name), y - FONT / 3
        for other_left, other_right, other in sorted(placed, key=lambda label: label[2]):
            if left < other_right and other_left < right and abs(height - other) < FONT:
                height = other + FONT
        placed.append((left, right, height))
        moved = height - y + FONT / 3
        line = {"arrowstyle": "-", "linewidth": 0.3} if moved > FONT / 2 else None
        offset = (6, height - y)
        ax.annotate(name, points[name], offset, textcoords="offset points", fontsize=FONT, arrowprops=line)


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
        ax.set(xlabel="bits per weight of the linears, everything counted", ylabel=label, yscale="log")
        ax.grid(visible=True, which="both", alpha=0.2)
    axes[0].axhline(float16["evaluation"]["ppl"], color="gray", linestyle=":", label="float16")
    axes[0].legend()
    figure.suptitle(f"{record['model']}: {record['evaluation']}", fontsize=9)
    figure.draw_without_rendering()  # where points are on the page is known from here on
    for ax, measure in zip(axes, MEASURES, strict=True):
        label_points(ax, {row["name"]: (row["bits_per_weight"], row["evaluation"][measure]) for row in rows})
    figure.savefig(arguments.plot)


if __name__ == "__main__":
    main()
