"""The command line: parse, build the values, call the library, print.

Exit codes: 0 done, 1 a checkpoint that `verify` found unsound, 2 a request that is wrong.

Whatever the library refuses (ValueError, OSError) becomes one line on stderr; any other exception is a defect of
rosaq and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import rosaq
from rosaq.checkpoint import bits_per_weight, read_config, total_bytes
from rosaq.cli_eval import eval_command
from rosaq.cli_options import Documents, JsonFile
from rosaq.demo import run_demo
from rosaq.doctor import diagnose, lines
from rosaq.evaluation import continue_text
from rosaq.recipes import preset_of
from rosaq.report.inspect import linears_by_kind, read_layers
from rosaq.report.progress import count_progress, quantize_progress
from rosaq.report.record import write_record
from rosaq.report.tables import (
    config_table,
    format_bytes,
    kinds_table,
    layers_table,
    quantize_table,
    verify_table,
)
from rosaq.specs import STRATEGIES, CalibrationSpec
from rosaq.text import builtin_text, read_text, select_documents

app = typer.Typer(
    help="INT3/INT4 language models with 16-bit salient directions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Dense model: a directory or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the checkpoint.")],
    recipe: Annotated[str, typer.Option(help="rtn, gptq, quarot, rosaq or rosaq-gptq.")] = "rosaq-gptq",
    preset: Annotated[str, typer.Option(help="fast, default or best: how much work goes into it.")] = "default",
    bits: Annotated[int, typer.Option(help="3 or 4.")] = 3,
    group_size: Annotated[int, typer.Option(help="In-features per scale; -1 for whole rows.")] = 64,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Default: the recipe's.")] = None,
    salient: Annotated[int | None, typer.Option(help="Directions kept in 16 bits. Default: the recipe's.")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits per weight on average, shared out between the layers.")
    ] = None,
    salient_energy: Annotated[
        float | None, typer.Option(help="Directions kept per layer: the fewest that hold this share of the energy.")
    ] = None,
    importance: Annotated[
        str | None, typer.Option(help=f"Of tokens: {', '.join(STRATEGIES)}. Default: the recipe's.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text or JSON lines. Default: built-in prose.")] = None,
    documents: Documents = None,
    num_sequences: Annotated[int | None, typer.Option(help="Calibration windows. Default: the preset's.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Calibration windows per forward pass.")] = 8,
    expansion: Annotated[int, typer.Option(help="Copies of each window, rolled to other positions.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the windows and the random rotations.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Quantise a model's linear layers into a new checkpoint directory."""
    if num_sequences is None:
        num_sequences = preset_of(preset).num_sequences
    spec = CalibrationSpec(num_sequences, sequence_length, batch_size, seed, expansion)
    request: dict[str, Any] = {
        "recipe": recipe,
        "preset": preset,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "salient": salient,
        "importance": importance,
        "target_bits": target_bits,
        "salient_energy": salient_energy,
        "force": force,
        "resume": resume,
    }
    with process_group() as is_first, quantize_progress() as progress:
        result = rosaq.quantize(
            model, output, calibration=_calibration(calibration, documents), spec=spec, progress=progress, **request
        )
    if not is_first:  # one of several processes tells what all of them made
        return
    Console().print(quantize_table(result.to_dict()))
    typer.echo(f"compare it with the original: rosaq eval {output} --reference {model}")
    if json_file:
        asked = request | {"model": model, "calibration": calibration, "documents": documents, "spec": vars(spec)}
        write_record(json_file, "quantize", asked, result.to_dict())


@contextmanager
def process_group() -> Iterator[bool]:
    """The processes that torchrun started together, if it did; True on the first one, which speaks for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()


def _calibration(path: Path | None, documents: str | None) -> list[str]:
    return select_documents(read_text(path) if path else builtin_text("calibration"), documents)


app.command("eval")(eval_command)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A directory (dense or rosaq) or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Continue a text."""
    text = continue_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, dtype=dtype)
    typer.echo(text)


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(help="A rosaq checkpoint.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per linear, with its measured error.")] = False,
) -> None:
    """Show what is in a checkpoint: formats, bits per weight, bytes, errors."""
    console = Console()
    console.print(config_table(read_config(directory), bits_per_weight(directory), total_bytes(directory)))
    console.print(kinds_table(linears_by_kind(directory)))
    if layers:
        rows = read_layers(directory)
        if not rows:
            raise ValueError(
                f"layers: got no rosaq_layers.json in {directory}, need a checkpoint made by rosaq quantize"
            )
        console.print(layers_table(rows))


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="A rosaq, GPTQ, AWQ or compressed-tensors checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the checkpoint.")],
    to: Annotated[
        str | None, typer.Option(help="dense or compressed-tensors (from rosaq), rosaq (from the others).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of dense weights: float16, bfloat16 or float32.")] = "float16",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a checkpoint in another format, with the same codes."""
    request: dict[str, Any] = {"to": to, "dtype": dtype, "force": force}
    with count_progress("converting", "linears") as progress:
        result = rosaq.convert(source, output, progress=progress, **request)
    typer.echo(
        f"{result.num_linears} linears: {result.source_format}, {format_bytes(result.source_bytes)} -> "
        f"{result.target_format}, {format_bytes(result.output_bytes)} in {output}"
    )
    if json_file:
        write_record(json_file, "convert", request | {"source": source, "output": output}, result.to_dict())


@app.command("verify")
def verify_command(
    directory: Annotated[Path, typer.Argument(help="A rosaq checkpoint.")],
    sample: Annotated[int, typer.Option(help="Linears to run against the float64 reference.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Check that a checkpoint is what it says it is; exit code 1 where it is not."""
    with count_progress("verifying", "linears") as progress:
        verdict = rosaq.verify(directory, sample=sample, progress=progress)
    Console().print(verify_table([check._asdict() for check in verdict.checks]))
    typer.echo("sound" if verdict.is_sound else "NOT SOUND: do not use this checkpoint")
    if json_file:
        write_record(json_file, "verify", {"directory": directory, "sample": sample}, verdict.to_dict())
    if not verdict.is_sound:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what this machine can run, and why not."""
    facts = diagnose()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where the models go.")] = Path("demo"),
    calibration: Annotated[Path | None, typer.Option(help="Text or JSON lines. Default: built-in prose.")] = None,
    documents: Documents = None,
    text: Annotated[Path | None, typer.Option(help="Evaluation text. Default: built-in prose.")] = None,
    windows: Annotated[int, typer.Option(help="Evaluation windows of 512 tokens.")] = 10,
    num_sequences: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Quantise a real 135M model two ways, compare them, and let the result talk."""
    run_demo(directory, _calibration(calibration, documents), text, windows, num_sequences, json_file)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `rosaq` command; `arguments` default to those of the process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar is enough: ours
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="rosaq")
    except (ValueError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
