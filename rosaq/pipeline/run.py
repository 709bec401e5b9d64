"""Quantise a model: the order of the steps, and what is kept of each."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosaq.checkpoint import bits_per_weight, total_bytes
from rosaq.config import LinearFormat
from rosaq.pipeline.assemble import Report, write_checkpoint
from rosaq.pipeline.block import (
    BlockTask,
    LinearReport,
    Streams,
    effective_weight,
    formats,
    online,
    quantize_block,
)
from rosaq.pipeline.probe import MAX_TOKENS, Probe, check_equal
from rosaq.pipeline.request import calibration_windows, check_formats, fit_to_family, request_of
from rosaq.pipeline.rotations import Rotations, choose_rotations
from rosaq.pipeline.source import DenseModel, local_directory
from rosaq.pipeline.workspace import Workspace, block_name, check_output
from rosaq.recipes import DEFAULT_PRESET, DEFAULT_RECIPE, make_recipe, preset_of, with_counted_salient
from rosaq.rotation import fold_norms, rotate_block, rotate_rows, unit_gain
from rosaq.specs import CalibrationSpec, Recipe

Tensors = dict[str, Tensor]
_AXES_TOKENS = 16384  # that principal axes are measured on, in every block: more do not move the few that are kept


@dataclass(frozen=True)
class ProgressEvent:
    """One step done: stage "axes", "blocks" or "write", block number (from 0), mean SQNR of its linears in dB."""

    stage: str
    block: int
    num_blocks: int
    error_db: float | None
    seconds: float


@dataclass(frozen=True)
class QuantizeResult:
    """What a run made. rotation_error: largest logit difference between the dense and the folded and rotated model,
    relative to the largest logit (None where nothing was rotated). bytes: all tensors of the checkpoint."""

    output: str
    recipe: str
    bits_per_weight: float
    bytes: int
    seconds: float
    rotation_error: float | None
    peak_memory_bytes: int
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
    preset: str = DEFAULT_PRESET,
    calibration: list[str] | None = None,
    spec: CalibrationSpec | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> QuantizeResult:
    """Quantise the model in directory (or of hub name) `model` into the new directory `output`.

    recipe: a name of `rosaq.recipes.RECIPES`, or a `Recipe` of your own. bits, group_size, symmetric, salient,
    importance: None keeps the recipe's choice (3 bits in groups of 64). preset: "fast", "default" or "best": how many
    calibration windows (unless `spec` says so) and tuning steps. calibration: documents (None: prose Python carries).
    Memory holds one block, the token stream and one shard. `output` appears complete or not at all; an interrupted
    run continues with `resume` and ends bit-identical.

    Raises ValueError, FileNotFoundError or OSError naming the argument, what it got and what it needs.
    """
    started = time.monotonic()
    output = Path(output)
    chosen = make_recipe(
        recipe,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        salient=salient,
        importance=importance,
        preset=preset,
    )
    spec = spec or CalibrationSpec(num_sequences=preset_of(preset).num_sequences)
    check_output(output, force=force)
    dense = DenseModel(local_directory(model))
    chosen = fit_to_family(with_counted_salient(chosen, dense.blocks.sizes.hidden), dense.blocks.family)
    check_formats(dense.blocks, chosen)
    input_ids = calibration_windows(dense, calibration, spec)
    work = Workspace(output, request_of(dense, chosen, spec, input_ids), force=force, resume=resume)

    def report(stage: str, block: int, error_db: float | None = None) -> None:
        if progress is not None:
            event = ProgressEvent(stage, block, dense.blocks.sizes.num_blocks, error_db, time.monotonic() - started)
            progress(event)

    try:
        run = _Run(dense, chosen, spec, input_ids, work, report)
        run.choose_rotations()
        run.quantize_blocks()
        error = run.check_logits()
        write_checkpoint(dense, chosen, run.rotations, Report(run.reports, run.blocks, error), work)
        report("write", dense.blocks.sizes.num_blocks)
        work.commit()
    except BaseException:
        work.discard_if_empty()
        raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return QuantizeResult(
        output=str(output),
        recipe=chosen.name,
        bits_per_weight=bits_per_weight(output),
        bytes=total_bytes(output),
        seconds=time.monotonic() - started,
        rotation_error=error,
        peak_memory_bytes=peak,
        layers=[r.to_dict() for r in run.reports],
    )


class _Run:
    """The state that moves through the blocks: token stream, probe, and the reports so far."""

    def __init__(
        self,
        dense: DenseModel,
        recipe: Recipe,
        spec: CalibrationSpec,
        input_ids: Tensor,
        work: Workspace,
        report: Callable[..., None],
    ) -> None:
        self._dense, self._recipe, self._spec, self._work, self._report = dense, recipe, spec, work, report
        self._ids = input_ids
        self.rotations = Rotations()
        self.reports: list[LinearReport] = []
        self.blocks: list[dict[str, Any]] = []
        self._probe: Probe | None = None

    def choose_rotations(self) -> None:
        saved = self._work.load("rotations")
        if saved is not None:
            self.rotations = Rotations.from_tensors(saved[0])
            return
        enough = max(1, _AXES_TOKENS // (self._spec.batch_size * self._spec.sequence_length))
        stream = self._stream(None)[:enough] if self._recipe.needs_tokens else []
        self.rotations = choose_rotations(
            self._dense,
            self._recipe,
            stream,
            self._counts(),
            self._spec.seed,
            lambda block: self._report("axes", block),
        )
        self._work.save("rotations", self.rotations.to_tensors(), {})

    def quantize_blocks(self) -> None:
        """All blocks in order; the finished ones of an earlier run are read back instead of made again."""
        model, family = self._dense.blocks, self._dense.blocks.family
        stream = self._stream(self.rotations.residual) if self._recipe.needs_tokens else []
        streams = Streams(stream, list(stream) if self._recipe.tune.steps else [], self._counts()[: len(stream)])
        if not self._recipe.rotation.is_identity:
            ids = self._ids[:1, :MAX_TOKENS]
            self._probe = Probe(self._embed(ids, None), self._embed(ids, self.rotations.residual))
        finished = self._work.num_finished_blocks()
        for index in range(model.sizes.num_blocks):
            name = block_name(index)
            outputs = self._quantize_block(index, streams) if index >= finished else []
            saved = self._work.load(name)
            assert saved is not None
            tensors, values = saved
            self.reports += [LinearReport(**r) for r in values["reports"]]
            self.blocks.append({key: values[key] for key in ("tuned", "importance", "expert_tokens")})
            if "probe.dense" in tensors:
                self._probe = Probe(tensors.pop("probe.dense"), tensors.pop("probe.rotated"))
            runnable = _runnable(tensors, formats(self._recipe, family, self.rotations.of_block(index)))
            self._advance(index, streams, outputs, runnable)
            self._report("blocks", index, _mean_db(self.reports, len(values["reports"])))

    def _advance(self, index: int, streams: Streams, outputs: list[Tensor], quantised: Tensors) -> None:
        """The streams through block `index`: that of the second moments is `outputs` where they are known already."""
        if outputs:
            streams.moments[:] = outputs
        elif self._recipe.moments == "dense":
            weights = online(
                self._rotated(index, self._dense.block(index)),
                self._dense.blocks.family,
                self.rotations.of_block(index),
            )
            self._through(index, streams.moments, weights)
        else:
            self._through(index, streams.moments, quantised)
        self._through(index, streams.quantised, quantised)

    def _through(self, index: int, stream: list[Tensor], tensors: Tensors) -> None:
        name = self._dense.blocks.family.block_prefix(index)[:-1]
        for i, hidden in enumerate(stream):
            stream[i] = self._dense.blocks.run(index, tensors, hidden)
            if not torch.isfinite(stream[i]).all():
                raise ValueError(f"activations: {name}: got NaN or Inf after quantising it")

    def _quantize_block(self, index: int, streams: Streams) -> list[Tensor]:
        """Save the block; the outputs of the dense one, where they were computed on the way."""
        model, rotations = self._dense.blocks, self.rotations.of_block(index)
        dense, dtype = self._dense.block(index), self._dense.dtype
        weights = self._rotated(index, dense)
        task = BlockTask(model, index, weights, self._recipe, rotations, self._spec.seed, dtype)
        result = quantize_block(task, streams)
        stored = result.stored
        for name, tensor in weights.items():
            if name not in stored and name.rpartition(".")[0] not in model.family.linears:
                stored[name] = self._dense.to_storage(tensor, model.family.block_prefix(index) + name)
        if self._probe is not None:
            probe = self._probe.step(model, index, dense, weights, rotations)
            stored |= {"probe.dense": probe.dense, "probe.rotated": probe.rotated}
        self._work.save(
            block_name(index),
            stored,
            {
                "reports": [r.to_dict() for r in result.reports],
                "tuned": result.loss,
                "importance": result.importance,
                "expert_tokens": result.expert_tokens,
            },
        )
        return result.outputs

    def _rotated(self, index: int, dense: Tensors) -> Tensors:
        """The weights `dense` of block `index` rotated as the recipe says; norms are folded where the stream they
        norm is rotated, and only there."""
        model, rotations = self._dense.blocks, self.rotations.of_block(index)
        if self._recipe.rotation.is_identity:
            return dense
        folded = dense if rotations.residual is None else fold_norms(dense, model.family)
        return rotate_block(folded, rotations, model.family, model.sizes)

    def check_logits(self) -> float | None:
        """Largest relative logit difference of the probe; None where nothing was rotated."""
        if self._probe is None:
            return None
        model, get, residual = self._dense.blocks, self._dense.get, self.rotations.residual
        gain, head = get(self._dense.final_norm_name), get(self._dense.head_name)
        want = model.logits(self._probe.dense, gain, head)
        if residual is not None:
            head = rotate_rows(head, residual, gain + model.family.gain_offset)
            gain = unit_gain(gain, model.family)
        return check_equal(model.logits(self._probe.rotated, gain, head), want, "logits")

    def _embed(self, input_ids: Tensor, residual: Tensor | None) -> Tensor:
        rows = self._dense.get(self._dense.embedding_name)
        return self._dense.blocks.embed(rows if residual is None else rotate_rows(rows, residual), input_ids)

    def _counts(self) -> list[Tensor]:
        """How often each calibration token occurs, in the batches of the stream."""
        counts = torch.bincount(self._ids.flatten())[self._ids]
        return list(counts.split(self._spec.batch_size))

    def _stream(self, residual: Tensor | None) -> list[Tensor]:
        """Hidden states after the embedding, one tensor [batch, length, hidden] per batch."""
        return list(self._embed(self._ids, residual).split(self._spec.batch_size))


def _runnable(tensors: Tensors, fmts: dict[str, LinearFormat]) -> Tensors:
    """Stored tensors of a block -> the dense float32 weights they stand for, as the block's code wants them."""
    result: Tensors = {}
    for linear, fmt in fmts.items():
        own = {n.removeprefix(f"{linear}."): t for n, t in tensors.items() if n.startswith(f"{linear}.")}
        result[f"{linear}.weight"] = effective_weight(own, fmt)
        if "bias" in own:
            result[f"{linear}.bias"] = own["bias"].float()
    others = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[0] not in fmts}
    return result | others


def _mean_db(reports: list[LinearReport], last: int) -> float:
    return sum(r.sqnr_db for r in reports[-last:]) / last
