"""JSONs of run.py as one Markdown table, sorted by bits per weight: `python table.py RESULTS.json ...`.

Of several (one per calibration seed) it shows the mean of those that have a row, ± half the distance of the extremes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = (
    ("bits/weight", "bits_per_weight", "{:.2f}"),
    ("perplexity", "evaluation.ppl", "{:.2f}"),
    ("KL", "evaluation.kl", "{:.3f}"),
    ("KL, 99th percentile", "evaluation.kl_p99", "{:.2f}"),
    ("same top token", "evaluation.top1_agreement", "{:.1%}"),
    ("perplexity, long windows", "evaluation_long.ppl", "{:.2f}"),
    ("KL, long windows", "evaluation_long.kl", "{:.3f}"),
    ("perplexity, held back", "held_back.ppl", "{:.2f}"),
    ("KL, held back", "held_back.kl", "{:.3f}"),
    ("CPU seconds", "cpu_seconds", "{:.0f}"),
)


def cell(rows: list[dict[str, Any]], path: str, shape: str) -> str:
    """What `path` names in the rows, "-" where they have none."""
    values: list[float] = []
    for row in rows:
        value: Any = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values += [] if value is None else [value]
    if not values:
        return "-"
    mean, spread = shape.format(sum(values) / len(values)), shape.format((max(values) - min(values)) / 2)
    return mean if len(values) == 1 else f"{mean} ± {spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in parser.parse_args().results:
        for row in json.loads(path.read_text())["rows"]:
            rows.setdefault(row["name"], []).append(row)
    print("| | " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, own in sorted(rows.items(), key=lambda item: item[1][0]["bits_per_weight"]):
        print(f"| {name} | " + " | ".join(cell(own, path, shape) for _, path, shape in COLUMNS) + " |")


if __name__ == "__main__":
    main()
