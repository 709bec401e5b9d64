"""Tune the finished blocks together, and save what they store then beside what each of them stored alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from rosaq.config import LinearFormat
from rosaq.pipeline.block import of_linear
from rosaq.pipeline.source import DenseModel
from rosaq.pipeline.workspace import Workspace, block_name
from rosaq.specs import TuneSpec
from rosaq.tuning import Predictions, TunedBlock, TunedLinear, tune_model

Tensors = dict[str, Tensor]
_DONE = "tuned"  # the step that is saved when all blocks are


def tuned_block_name(index: int) -> str:
    """Name of the saved step that holds block `index` after the model was tuned as a whole."""
    return f"tuned-{index:05d}"


def finished_block(work: Workspace, index: int) -> Tensors:
    """What block `index` stores in the end: as tuned with the whole model, where that was done."""
    return _saved(work, tuned_block_name(index)) or _block(work, index)


def tune_whole_model(
    dense: DenseModel,
    formats: list[dict[str, LinearFormat]],
    predictions: Predictions,
    spec: TuneSpec,
    seed: int,
    work: Workspace,
    progress: Callable[[int, int], None],
) -> tuple[float, float]:
    """(divergence before, after) in nats per token; the tuned blocks are in the workspace. formats: of every block.

    An interrupted tuning starts again from the blocks as they were quantised. Where it made the model worse, they stay
    as they were, with a warning.
    """
    saved = work.load(_DONE)
    if saved is None:
        blocks = [_tuned_block(dense, _block(work, i), fmts) for i, fmts in enumerate(formats)]
        loss = tune_model(dense.passes, blocks, predictions, spec, seed, progress)
        before, after = loss
        if after > before:
            warnings.warn(
                f"tuning the whole model raised its divergence from {before:.3g} to {after:.3g}: it stays as it was",
                stacklevel=2,
            )
            loss = before, before
        else:
            for index, block in enumerate(blocks):
                work.save(tuned_block_name(index), _as_tuned(dense, _block(work, index), block), {})
        work.save(_DONE, {}, {"loss": loss})
        return loss
    before, after = saved[1]["loss"]
    return before, after


def _as_tuned(dense: DenseModel, stored: Tensors, block: TunedBlock) -> Tensors:
    """What a block stores, with what tuning moved."""
    moved = {
        f"{name}.{tensor}": value for name, linear in block.linears.items() for tensor, value in linear.stored().items()
    }
    return stored | moved | {name: gain.detach().to(dense.dtype) for name, gain in block.gains().items()}


def _block(work: Workspace, index: int) -> Tensors:
    saved = _saved(work, block_name(index))
    assert saved is not None
    return saved


def _saved(work: Workspace, step: str) -> Tensors | None:
    """The tensors of a saved step, without those of the probe; None where it is not finished."""
    saved = work.load(step)
    return None if saved is None else {n: t for n, t in saved[0].items() if not n.startswith("probe.")}


def _tuned_block(dense: DenseModel, stored: Tensors, formats: dict[str, LinearFormat]) -> TunedBlock:
    """The block as it is stored, trainable but for its codes."""
    family = dense.blocks.family
    linears = {name: TunedLinear(None, of_linear(stored, name), fmt) for name, fmt in formats.items()}
    gains = {name: stored[name].float() for name in family.gains}
    others = {
        name: tensor.float()
        for name, tensor in stored.items()
        if name not in gains and (name.rpartition(".")[0] not in formats or name.endswith(".bias"))
    }
    return TunedBlock(linears, gains, others, dense.dtype, gain_offset=family.gain_offset)
