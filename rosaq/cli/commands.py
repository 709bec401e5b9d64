"""The command line: parse, build the values, call the library, print.

Exit codes: 0 done, 1 a checkpoint that `verify` found unsound, 2 a request that is wrong.

Whatever the library refuses (ValueError, OSError) becomes one line on stderr; any other exception is a defect of
rosaq and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import rosaq
from rosaq.checkpoint import bits_by_tensor, model_directory, read_config, read_json, total_bytes
from rosaq.cli.evaluate import eval_command
from rosaq.cli.options import Device, Documents, JsonFile, calibration_documents
from rosaq.cli.quantize import quantize_command
from rosaq.demo import run_demo
from rosaq.doctor import diagnose, lines
from rosaq.evaluation import continue_text
from rosaq.report.console import wide_console
from rosaq.report.inspect import linears_by_kind, read_layers
from rosaq.report.progress import count_progress
from rosaq.report.record import write_record
from rosaq.report.tables import (
    config_table,
    format_bytes,
    kinds_table,
    layers_table,
    verify_table,
)

app = typer.Typer(
    help="INT3/INT4 language models with 16-bit salient directions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rosaq {rosaq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """INT3/INT4 language models with 16-bit salient directions."""
    del version


app.command("quantize")(quantize_command)
app.command("eval")(eval_command)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A directory (dense or rosaq) or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    device: Device = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="Up to a minute first, then faster tokens.")] = False,
) -> None:
    """Continue a text; how long a token took goes to standard error."""
    wanted: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    made = continue_text(model, prompt, dtype=dtype, device=device, compile=compile, **wanted)
    typer.echo(made.text)
    times = [f"{1e3 * made.first_seconds:.1f} ms for the first"]
    if made.compile_seconds is not None:
        times.append(f"{made.compile_seconds:.0f} s for the second with compiling")
    if made.token_seconds is not None:
        times.append(f"{1e3 * made.token_seconds:.1f} ms for each further one")
    typer.echo(f"{made.num_tokens} tokens: {', '.join(times)}", err=True)


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="A rosaq checkpoint: a directory or a hub id.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per linear, with its measured error.")] = False,
) -> None:
    """Show what is in a checkpoint: formats, bits per weight, bytes, errors."""
    directory = model_directory(checkpoint, "checkpoint")
    console = wide_console()
    console.print(config_table(read_config(directory), bits_by_tensor(directory), total_bytes(directory)))
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
    source: Annotated[
        str, typer.Argument(help="A rosaq, GPTQ, AWQ or compressed-tensors checkpoint: a directory or a hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the checkpoint.")],
    to: Annotated[
        str | None, typer.Option(help="dense or compressed-tensors (from rosaq), rosaq (from the others).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of dense weights: float16, bfloat16 or float32. Default: float16.")
    ] = None,
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
    checkpoint: Annotated[str, typer.Argument(help="A rosaq checkpoint: a directory or a hub id.")],
    sample: Annotated[int, typer.Option(help="Linears to run against the float64 reference.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Check that a checkpoint is what it says it is; exit code 1 where it is not."""
    directory = model_directory(checkpoint, "checkpoint")
    if _is_dense(directory):  # not unsound, but another thing
        raise ValueError(f"{directory}: got a model without quantization_config, need a checkpoint written by rosaq")
    with count_progress("verifying", "linears") as progress:
        verdict = rosaq.verify(directory, sample=sample, progress=progress)
    wide_console().print(verify_table([check._asdict() for check in verdict.checks]))
    typer.echo("sound" if verdict.is_sound else "NOT SOUND: do not use this checkpoint")
    if json_file:
        write_record(json_file, "verify", {"directory": checkpoint, "sample": sample}, verdict.to_dict())
    if not verdict.is_sound:
        raise typer.Exit(1)


def _is_dense(directory: Path) -> bool:
    config = directory / "config.json"
    with contextlib.suppress(ValueError):
        return config.is_file() and "quantization_config" not in read_json(config)
    return False  # a damaged file, of which `verify` tells more


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
    run_demo(directory, calibration_documents(calibration, documents), text, windows, num_sequences, json_file)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `rosaq` command; `arguments` default to those of the process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar is enough: ours
    if arguments is None:  # in a process of its own
        warnings.showwarning = cast(Any, _show_warning)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="rosaq")
    except (ValueError, OSError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(2)


def _show_warning(message: Warning | str, *_where: Any, **_further: Any) -> None:
    """One line, without the place in the source, which tells a user nothing."""
    typer.echo("warning: " + " ".join(str(message).split()), err=True)
