"""`rosaq quantize`, on one process or on those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import rosaq
from rosaq.cli.options import Device, Documents, JsonFile, calibration_documents
from rosaq.recipes import RECIPES, preset_of
from rosaq.report.console import wide_console
from rosaq.report.progress import quantize_progress
from rosaq.report.record import write_record
from rosaq.report.tables import quantize_table
from rosaq.specs import STRATEGIES, CalibrationSpec


def quantize_command(
    model: Annotated[str, typer.Argument(help="Dense model: a directory or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the checkpoint.")],
    recipe: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")] = "rosaq-gptq",
    preset: Annotated[str, typer.Option(help="fast, default or best: how much work goes into it.")] = "default",
    device: Device = "cpu",
    bits: Annotated[
        int | None, typer.Option(help="3 or 4, everywhere. Default: a mixture under --target-bits, or 3.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="In-features per scale; -1 for whole rows. Default: whole rows under a target below 4.1, or 64."
        ),
    ] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Default: the recipe's.")] = None,
    salient: Annotated[int | None, typer.Option(help="Directions kept in 16 bits. Default: the recipe's.")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits per weight on average, shared out between the layers. Default of rosaq-gptq: 3.45."),
    ] = None,
    salient_energy: Annotated[
        float | None, typer.Option(help="Directions kept per layer: the fewest that hold this share of the energy.")
    ] = None,
    head_bits: Annotated[int, typer.Option(help="Of the output head: 3, 4, or 16 to leave it alone.")] = 16,
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
        "device": device,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "salient": salient,
        "importance": importance,
        "target_bits": target_bits,
        "salient_energy": salient_energy,
        "head_bits": head_bits,
        "force": force,
        "resume": resume,
    }
    with process_group(device) as is_first, quantize_progress() as progress:
        text = calibration_documents(calibration, documents)
        result = rosaq.quantize(model, output, calibration=text, spec=spec, progress=progress, **request)
    if not is_first:  # one of several processes tells what all of them made
        return
    wide_console().print(quantize_table(result.to_dict()))
    typer.echo(f"compare it with the original: rosaq eval {output} --reference {model}")
    if json_file:
        asked = request | {"model": model, "calibration": calibration, "documents": documents, "spec": vars(spec)}
        write_record(json_file, "quantize", asked, result.to_dict())


@contextmanager
def process_group(device: str) -> Iterator[bool]:
    """The processes that torchrun started together, if it did; True on the first one, which speaks for all. What is on
    GPUs is summed by NCCL, where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    has_nccl = device != "cpu" and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()
