"""The shipped recipe with one ingredient off at a time, everything else and the bits the same. Writes JSON.

    python benchmarks/accuracy/ablation.py --model DENSE --calibration c4.jsonl --documents 0:1500 \\
        --text wiki.test.raw --held-back c4.jsonl --held-back-documents 1500:2000 \\
        --work FOLDER --out benchmarks/results/accuracy-ablation.json [--preset fast] [--only NAME ...]

What is finished is in the JSON and is not run again. 3.45 bits per weight are shared out anew for every row, so an
ingredient that costs bits gives them back to the codes when it is off.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import rosaq
from rosaq.evaluation import evaluate, load_subject
from rosaq.recipes import DEFAULT_RECIPE, RECIPES, make_recipe
from rosaq.report.record import environment
from rosaq.specs import BudgetSpec, ImportanceSpec, Recipe, RotationSpec, RowSpec, SalientSpec
from rosaq.text import read_text, select_documents

CONTEXT = 512
KEPT = ("ppl", "kl", "kl_p99", "top1_agreement", "tokens")
SHIPPED = RECIPES[DEFAULT_RECIPE]


def variants() -> dict[str, Recipe]:
    """The shipped recipe first, then without each of its ingredients."""
    quant, rotation, salient, tune = SHIPPED.quant, SHIPPED.rotation, SHIPPED.salient, SHIPPED.tune
    directions, one, two = (replace(SHIPPED.budget, most=most) for most in (16, 1, 2))
    groups = replace(quant, group_size=64)
    return {
        "as shipped": SHIPPED,
        "tokens weigh the same": replace(SHIPPED, importance=ImportanceSpec("uniform")),
        "principal directions where the budget finds them": replace(SHIPPED, budget=directions),
        "rotations drawn, not fitted": replace(
            SHIPPED, rotation=replace(rotation, residual="pca-random", values="random")
        ),
        "rotations of values drawn, not fitted": replace(SHIPPED, rotation=replace(rotation, values="random")),
        "one direction a site at most": replace(SHIPPED, budget=one),
        "bases of up to two at o_proj and down_proj": replace(
            SHIPPED, salient=SalientSpec(sites=("values", "hidden"), basis=("values", "hidden")), budget=two
        ),
        "no rotation, the largest channels in 16 bits": replace(
            SHIPPED, rotation=RotationSpec(), salient=replace(salient, by="energy"), budget=directions
        ),
        "no rotation of values": replace(SHIPPED, rotation=replace(rotation, values="none")),
        "no rotation at down_proj": replace(SHIPPED, rotation=replace(rotation, mlp_out="none")),
        # rows hear of each other with presets that tune, not with `fast`
        "rows are independent": replace(SHIPPED, rows=RowSpec()),
        "errors carried from row to row in all linears": replace(SHIPPED, rows=replace(SHIPPED.rows, sites=())),
        "no refinement": replace(SHIPPED, quant=replace(quant, refine=0)),
        "whole zero points": replace(SHIPPED, quant=replace(quant, half_zeros=False)),
        "no clip search": replace(SHIPPED, quant=replace(quant, clip=False)),
        "round to nearest": replace(SHIPPED, quant=replace(quant, method="rtn", refine=0), rows=RowSpec()),
        "one width, groups of 64": replace(SHIPPED, quant=groups, budget=BudgetSpec()),
        "no tuning of blocks": replace(SHIPPED, tune=replace(tune, steps=0)),
        "no tuning of the model": replace(SHIPPED, tune=replace(tune, model_steps=0)),
        "no tuning": replace(SHIPPED, tune=replace(tune, steps=0, model_steps=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--documents", default=None, help="START:STOP of the calibration documents")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--held-back", type=Path, required=True, help="text of the calibration's kind")
    parser.add_argument("--held-back-documents", default=None)
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows of 512 tokens, of either text")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--device", default="cpu", help="where it is quantised; it is evaluated on the CPU")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints go here, and away again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=variants(), help="default: all")
    args = parser.parse_args()
    drawn = f"{args.calibration.name}[{args.documents}], seed 0"
    record: dict[str, Any] = {"model": args.model.name, "preset": args.preset, "calibration": drawn, "rows": []}
    if args.out.is_file():
        record = json.loads(args.out.read_text())
        if record["preset"] != args.preset:
            raise ValueError(f"{args.out}: got rows of preset {record['preset']!r}, need a new file")
    texts: dict[str, dict[str, Any]] = {
        "evaluation": {"text": args.text, "documents": None},
        "held_back": {"text": args.held_back, "documents": args.held_back_documents},
    }
    reference, done = load_subject(args.model), {row["name"] for row in record["rows"]}
    shipped = make_recipe(SHIPPED, preset=args.preset)
    for name, recipe in variants().items():
        if name in done or (args.only is not None and name not in args.only):
            continue
        if recipe != SHIPPED and make_recipe(recipe, preset=args.preset) == shipped:
            print(f"{name}: nothing to switch off in preset {args.preset}", flush=True)
            continue
        folder = args.work / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        made = rosaq.quantize(
            args.model,
            folder,
            recipe=recipe,
            preset=args.preset,
            device=args.device,
            calibration=select_documents(read_text(args.calibration), args.documents),
        )
        row: dict[str, Any] = {"name": name, "bits_per_weight": made.bits_per_weight}
        for key, text in texts.items():
            result = evaluate(load_subject(folder), reference=reference, context=CONTEXT, windows=args.windows, **text)
            row[key] = {kept: getattr(result, kept) for kept in KEPT}
        record["rows"].append(row | {"commit": environment()["commit"]})
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
