"""`quantize`: check the request, run the stages, write the checkpoint."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.calibrate import is_first_rank
from rosaq.checkpoint import bits_by_tensor, check_output, total_bytes
from rosaq.devices import choose_device
from rosaq.pipeline.assemble import Report, write_checkpoint
from rosaq.pipeline.request import (
    calibration_windows,
    check_formats,
    check_target,
    fit_to_family,
    request_of,
    tell_cpu_only,
    tell_dense_rotations,
    tell_untied_head,
)
from rosaq.pipeline.run import Run
from rosaq.pipeline.source import DenseModel, local_directory
from rosaq.pipeline.workspace import Workspace
from rosaq.recipes import (
    DEFAULT_PRESET,
    DEFAULT_RECIPE,
    make_recipe,
    preset_of,
)
from rosaq.specs import CalibrationSpec, Recipe


@dataclass(frozen=True)
class ProgressEvent:
    """One step done: stage "axes", "fit", "blocks", "tuning", "head" or "write", number of the block, step or part of
    the head (from 0) and how many there are, mean SQNR of the block's linears in dB."""

    stage: str
    block: int
    num_blocks: int
    error_db: float | None
    seconds: float


@dataclass(frozen=True)
class QuantizeResult:
    """What a run made. rotation_error: largest logit difference between the dense and the folded and rotated model,
    relative to the largest logit (None where nothing was rotated; of a mixture, whose blocks are compared one by
    one, what the last norm and the head add). bytes: all tensors of the checkpoint.
    bits_per_weight: stored for the blocks' linears; bits_by_tensor: what it is the sum of, {"qweight": bits, "scales":
    bits, ...}. head_bits_per_weight: stored for the output head, None where it stays in 16 bits. device: "cpu" or this
    process's GPU, as "cuda:0"; peak_gpu_memory_bytes: what tensors took of it at most, None on the CPU."""

    output: str
    recipe: str
    bits_per_weight: float
    bits_by_tensor: dict[str, float]
    head_bits_per_weight: float | None
    bytes: int
    seconds: float
    rotation_error: float | None
    peak_memory_bytes: int
    device: str = "cpu"
    peak_gpu_memory_bytes: int | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    salient: int | None = None,
    importance: str | None = None,
    target_bits: float | None = None,
    salient_energy: float | None = None,
    head_bits: int | None = None,
    preset: str = DEFAULT_PRESET,
    device: str = "cpu",
    calibration: str | Path | list[str] | None = None,
    spec: CalibrationSpec | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> QuantizeResult:
    """Quantise the model in directory (or of hub name) `model` into the new directory `output`.

    recipe          a name of `rosaq.recipes.RECIPES`, or a `Recipe` of your own.
    bits, group_size, symmetric, salient, importance: None keeps the recipe's choice. The target of a recipe by name
                    falls away once one of the first two or salient is given: all sites get the same. A `Recipe` of your
                    own keeps its budget, and bits or salient that it chooses are refused.
    target_bits     bits per weight on average (rosaq-gptq: 3.45): widths and directions are shared out between sites.
                    Above 4.1 all codes have 4 bits, in groups as small as the target pays for, if none are said.
    salient_energy  directions per site by the share of energy they hold.
    head_bits       3 or 4: the output head gets codes of so many bits and is untied from the embedding, which stays in
                    16; 16 leaves it alone; None keeps the recipe's choice (16).
    preset          "fast", "default" or "best": how many calibration windows (unless `spec` says so) and tuning steps.
    device          "cpu", "cuda" or "cuda:1": where everything is computed. The CPU unless said otherwise, because a
                    result is reproducible, bit by bit, only on one kind of device: floating point sums have another
                    order on each, and a code near the middle between two can fall on either side. Random draws are the
                    same everywhere. The checkpoint runs everywhere, whatever made it.
    calibration     a file (plain text or JSON lines), a list of documents, or None: prose that Python carries.

    Memory holds one block, the token stream and one shard, and where the whole model is tuned (presets "default" and
    "best") every code too, a byte each. `output` appears complete or not at all; an interrupted run
    continues with `resume` on the same kind of device, and ends bit-identical.

    Under torch.distributed (`torchrun -m rosaq quantize ...`) every process calibrates on its share of the sequences,
    on a file system that all of them see; second moments are summed in float64. With device "cuda" each takes the GPU
    of its LOCAL_RANK.

    Raises ValueError, FileNotFoundError or OSError naming the argument, what it got and what it needs.
    """
    started = time.monotonic()
    output, place = Path(output), choose_device(device)
    if place.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(place)
    chosen = make_recipe(
        recipe,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        salient=salient,
        importance=importance,
        target_bits=target_bits,
        salient_energy=salient_energy,
        head_bits=head_bits,
        preset=preset,
    )
    spec = spec or CalibrationSpec()
    if spec.num_sequences is None:
        spec = replace(spec, num_sequences=preset_of(preset).num_sequences)
    directory = local_directory(model)
    check_output(output, force=force, source=directory)
    dense = DenseModel(directory, bf16=spec.bf16, device=place)
    chosen = fit_to_family(chosen, dense.blocks.family)
    check_formats(dense.blocks, chosen)
    check_target(dense.blocks, chosen)
    tell_cpu_only(chosen)
    tell_dense_rotations(dense.blocks, chosen)
    tell_untied_head(dense, chosen)
    input_ids = calibration_windows(dense, chosen, calibration, spec)
    work = Workspace(output, request_of(dense, chosen, spec, input_ids), place, force=force, resume=resume)

    def report(stage: str, block: int, error_db: float | None = None, total: int | None = None) -> None:
        if progress is not None and is_first_rank():
            total = dense.blocks.sizes.num_blocks if total is None else total
            progress(ProgressEvent(stage, block, total, error_db, time.monotonic() - started))

    try:
        run = Run(dense, chosen, spec, input_ids, work, report)
        run.choose_rotations()
        run.measure_predictions()
        run.settle_rotations()
        run.quantize_blocks()
        error = run.check_logits()
        run.tune_model()
        run.quantize_head()
        if is_first_rank():
            write_checkpoint(dense, run.plan, Report(run.reports, run.blocks, error, run.divergence), work)
        report("write", dense.blocks.sizes.num_blocks)
        work.commit()
    except BaseException:
        work.discard_if_empty()
        raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stored = bits_by_tensor(output)
    return QuantizeResult(
        output=str(output),
        recipe=chosen.name,
        bits_per_weight=sum(stored.values()),
        bits_by_tensor=stored,
        head_bits_per_weight=run.reports[-1].bits_per_weight if chosen.quantizes_head else None,
        bytes=total_bytes(output),
        seconds=time.monotonic() - started,
        rotation_error=error,
        peak_memory_bytes=peak,
        device=str(place),
        peak_gpu_memory_bytes=torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
        layers=[r.to_dict() for r in run.reports],
    )
