"""Quantise one model with rosaq and its rivals at about equal bits, and measure all of them with `rosaq.evaluate`.

    python benchmarks/accuracy/run.py --model DENSE --calibration c4.jsonl --documents 0:1500 \\
        --text wiki.test.raw --held-back c4.jsonl --held-back-documents 1500:2000 \\
        --work FOLDER --out benchmarks/results/accuracy-rivals.json

Every tool runs in its own environment (made under --work), on one CPU thread, on the same calibration tokens. Its
checkpoint is decoded to dense float16 weights, and those are evaluated: one code measures all. What is finished is in
the JSON and is not run again, so that a run of hours can be stopped at any time (a row without one of the texts gets
it from its checkpoint); --only picks runs by name. Another --seed draws other calibration windows, for another JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bits import bits_per_weight
from rivals import ENVIRONMENTS, NOT_RUN, RUNS, SEQUENCES, Environment, Run

import rosaq
from rosaq.evaluation import EvalResult, Subject, evaluate, load_subject
from rosaq.report.record import environment
from rosaq.text import read_text, select_documents, token_windows

HERE = Path(__file__).parent
CONTEXT = 512
LONG_CONTEXT = 2048
KEPT = ("ppl", "bits_per_byte", "kl", "kl_p99", "top1_agreement", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense float16 directory, Llama family")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--documents", default=None, help="START:STOP of the calibration documents")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument(
        "--held-back", type=Path, required=True, help="text of the calibration's kind, never calibrated on"
    )
    parser.add_argument("--held-back-documents", default=None)
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows of 512 tokens, of either text")
    parser.add_argument("--seed", type=int, default=0, help="which calibration windows are drawn")
    parser.add_argument("--work", type=Path, required=True, help="environments and checkpoints go here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], help="default: all")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    record = _record(arguments)
    reference = load_subject(arguments.model)
    rows = {row["name"]: row for row in record["rows"]}
    base = rows.get("float16", {"name": "float16", "tool": None, "bits_per_weight": 16.0})
    _measure(base, reference, None, arguments, record)
    for run in RUNS:
        if arguments.only is not None and run.name not in arguments.only:
            continue
        row = rows.get(run.name)
        if row is not None and not _missing(row):
            continue
        made = quantise(run, arguments)
        dense, bits = decode(run, _folder(run, arguments), arguments.model)
        row = row or asdict(run) | {"bits_per_weight": bits, "commit": environment()["commit"]} | made
        _measure(row, load_subject(dense), reference, arguments, record)


def _folder(run: Run, arguments: argparse.Namespace) -> Path:
    work: Path = arguments.work
    return work / f"{run.name.lower().replace(' ', '-')}-seed-{arguments.seed}"


def _record(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is on disk already, or the head of a new record."""
    windows = f"{arguments.windows} windows of {CONTEXT} tokens"
    drawn = f"windows of {CONTEXT} tokens, seed {arguments.seed}"
    head = {
        "model": arguments.model.name,
        "calibration": f"{arguments.calibration.name}[{arguments.documents}], {drawn}",
        "evaluation": f"{arguments.text.name}, the first {windows}, no BOS, float32",
        "evaluation_long": f"the same tokens in windows of {LONG_CONTEXT}",
        "held_back": f"{arguments.held_back.name}[{arguments.held_back_documents}], likewise",
        "not_run": NOT_RUN,
    }
    if not arguments.out.is_file():
        return head | {"rows": [], "environment": environment()}
    record: dict[str, Any] = json.loads(arguments.out.read_text())
    changed = [key for key in ("model", "calibration", "evaluation", "held_back") if record[key] != head[key]]
    if changed:
        raise ValueError(f"{arguments.out}: got rows of another {changed[0]} ({record[changed[0]]}), need a new file")
    return record | head


def _texts(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What a row is measured on, by its key there; the long windows hold the same tokens as the short ones."""
    tokens = arguments.windows * CONTEXT
    wiki = {"text": arguments.text, "documents": None}
    held_back = {"text": arguments.held_back, "documents": arguments.held_back_documents}
    short, long = ({"context": c, "windows": max(1, tokens // c)} for c in (CONTEXT, LONG_CONTEXT))
    return {"evaluation": wiki | short, "held_back": held_back | short, "evaluation_long": wiki | long}


def _missing(row: dict[str, Any]) -> list[str]:
    return [name for name in ("evaluation", "held_back", "evaluation_long") if name not in row]


def _measure(
    row: dict[str, Any],
    subject: Subject,
    reference: Subject | None,
    arguments: argparse.Namespace,
    record: dict[str, Any],
) -> None:
    """Measure what the row lacks, and write the record."""
    missing, texts = _missing(row), _texts(arguments)
    for name in missing:
        result: EvalResult = evaluate(subject, reference=reference, **texts[name])
        row[name] = {key: getattr(result, key) for key in KEPT}
    if missing:
        record["rows"] = [other for other in record["rows"] if other["name"] != row["name"]] + [row]
        arguments.out.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


def quantise(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tool, unless its checkpoint is complete; {"cpu_seconds", "versions"} of the run that made it."""
    folder = _folder(run, arguments)
    note = folder / "run.json"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = _command(run, folder / "native", arguments)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # One thread: what is compared is the work, not how it is spread.
        with (folder / "log.txt").open("w") as log:
            settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            code = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT, env=settings).returncode
        if code != 0:
            raise RuntimeError(f"{run.name}: got exit code {code}, need 0; the reason is in {folder / 'log.txt'}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        note.write_text(json.dumps({"cpu_seconds": round(seconds), "versions": _versions(run, arguments.work)}))
    made: dict[str, Any] = json.loads(note.read_text())
    return made


def _command(run: Run, native: Path, arguments: argparse.Namespace) -> list[str]:
    if run.script is None:
        source = ["--calibration", str(arguments.calibration), "--num-sequences", str(run.sequences)]
        source += ["--seed", str(arguments.seed)]
        source += ["--documents", arguments.documents] if arguments.documents else []
        return [
            sys.executable,
            "-m",
            "rosaq",
            "quantize",
            str(arguments.model),
            "-o",
            str(native),
            *run.arguments,
            *source,
        ]
    python = make_environment(run.tool, ENVIRONMENTS[run.tool], arguments.work)
    windows = _windows(arguments, run.sequences)
    command = [str(python), str(HERE / run.script), str(arguments.model), str(windows), str(native), *run.arguments]
    if ENVIRONMENTS[run.tool].npm is not None:
        libraries = sorted((arguments.work / f"env-{run.tool}").rglob("libllama.*so*"))
        command += ["--library", str(libraries[0])]
    return command


def make_environment(tool: str, environment: Environment, work: Path) -> Path:
    """The Python of the tool's virtual environment, made on first use."""
    folder = work / f"env-{tool}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *environment.packages], check=True)
        if environment.npm is not None:
            subprocess.run(["npm", "pack", "--silent", environment.npm], check=True, cwd=folder)
            subprocess.run(["tar", "xzf", str(next(folder.glob("*.tgz")))], check=True, cwd=folder)
        (folder / "complete").touch()
    return python


def _windows(arguments: argparse.Namespace, sequences: int) -> Path:
    """The file with the first `sequences` of the calibration windows, which are those that rosaq's own run draws."""
    path: Path = arguments.work / f"windows-{sequences}-seed-{arguments.seed}.npy"
    if not path.is_file():
        documents = select_documents(read_text(arguments.calibration), arguments.documents)
        tokenizer = load_subject(arguments.model).tokenizer
        every = token_windows(tokenizer, documents, SEQUENCES, CONTEXT, seed=arguments.seed)
        np.save(path, every[:sequences].numpy())
    return path


def _versions(run: Run, work: Path) -> list[str]:
    if run.script is None:
        return [f"rosaq=={rosaq.__version__}"]
    wanted = ENVIRONMENTS[run.tool]
    python = work / f"env-{run.tool}" / "bin" / "python"
    listed = subprocess.run([str(python), "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    names = ("torch", "transformers", "compressed-tensors", *(package.split("==")[0] for package in wanted.packages))
    kept = [line for line in listed.splitlines() if line.split("==")[0].lower() in names]
    return kept + ([wanted.npm] if wanted.npm else [])


def decode(run: Run, folder: Path, model: Path) -> tuple[Path, float]:
    """(dense float16 directory, bits per weight) of a finished checkpoint."""
    native, dense = folder / "native", folder / "dense"
    if run.tool == "llama.cpp":
        return native / "dense", bits_per_weight(native / "model.gguf", model)
    source = native
    if run.script is not None:
        source = folder / "rosaq"
        rosaq.convert(native, source, force=True)
    rosaq.convert(source, dense, to="dense", force=True)
    return dense, bits_per_weight(native, model)


if __name__ == "__main__":
    main()
