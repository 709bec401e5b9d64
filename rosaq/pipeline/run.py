"""The stages of a run, in order: rotations, blocks, the model as a whole, the check that rotating changed nothing, the
output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import num_ranks, own_share, site_gradients
from rosaq.pipeline.block import BlockTask, Streams, online, quantize_block, runnable
from rosaq.pipeline.budget import Choices, same_everywhere
from rosaq.pipeline.fitting import Fitting
from rosaq.pipeline.head import final_gain, head_rows, quantize_head
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.plan import Plan
from rosaq.pipeline.probe import MAX_TOKENS, Probe, check_equal
from rosaq.pipeline.rotations import Rotations, choose_rotations, mix_unkept
from rosaq.pipeline.site import LinearReport
from rosaq.pipeline.source import DenseModel
from rosaq.pipeline.sweep import Sweep
from rosaq.pipeline.whole_model import finished_block, tune_whole_model
from rosaq.pipeline.workspace import Workspace, block_name
from rosaq.rotation import fold_norms, rotate_block, rotate_rows
from rosaq.specs import CalibrationSpec, Recipe
from rosaq.tuning import Predictions

Tensors = dict[str, Tensor]
_AXES_TOKENS = 16384  # that principal axes are measured on, in every block: more do not move the few that are kept


class Run:
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
        self._ids = input_ids.to(dense.device)
        self.rotations = Rotations()
        self.choices: Choices = same_everywhere(recipe, dense.blocks.family, dense.blocks.sizes.num_blocks)
        self.reports: list[LinearReport] = []
        self.blocks: list[dict[str, Any]] = []
        self.divergence: tuple[float, float] | None = None
        self._dense_outputs: list[Tensor] = []
        self._sweep = Sweep(recipe, dense.passes, work)
        self._swept = Rotations()  # what the sweep saw
        self._probe: Probe | None = None

    def choose_rotations(self) -> None:
        saved = self._work.load("rotations")
        if saved is None:
            chosen = self._chosen_rotations().to_tensors()
            if not chosen:
                return  # a recipe without any: a run that then fails in its first block leaves nothing behind
            self._work.save("rotations", chosen, {})
            saved = self._work.load("rotations")  # by every rank: two GPUs need not find the same last bits
            assert saved is not None
        self.rotations = self._swept = Rotations.from_tensors(saved[0])

    def _chosen_rotations(self) -> Rotations:
        enough = max(num_ranks(), _AXES_TOKENS // (self._spec.batch_size * self._spec.sequence_length))
        stream = self._stream(None, enough) if self._recipe.needs_tokens else []
        return choose_rotations(
            self._dense,
            self._recipe,
            stream,
            self._counts(),
            self._spec.seed,
            lambda block: self._report("axes", block),
        )

    def measure_predictions(self) -> None:
        """What the budget and feedback between rows have to know, where the recipe has either: one sweep through the
        dense model and back."""
        if self._sweep.is_due:
            ids = self._ids[: self._sweep.sequences]
            found = site_gradients(
                self._dense.passes,
                self._running,
                *self._final(),
                self._embed(ids, self.rotations.residual),
                torch.Generator().manual_seed(self._spec.seed),
            )
            self._sweep.keep(found, self.rotations, self._rotated_dense, ids.numel())
        self.choices = self._sweep.choices() or self.choices

    def settle_rotations(self) -> None:
        """What had to wait for the budget. Principal axes that it left to no site (there are as many as a site could
        have had) join the mixed rest: as channels of their own they would be what rows range over. And where the recipe
        fits rotations to the weights, it is done now that it is known which axes are kept and what errors cost."""
        spec, is_fixed = self._recipe.rotation, self._recipe.budget.is_fixed
        if not spec.is_fitted and (is_fixed or spec.residual != "pca-random"):
            return
        saved = self._work.load("settled")
        if saved is None:
            self._work.save("settled", self._settled().to_tensors(), {})
            saved = self._work.load("settled")  # by every rank, as the rotations
            assert saved is not None
        self.rotations = Rotations.from_tensors(saved[0])

    def _settled(self) -> Rotations:
        spec, seed, kept = self._recipe.rotation, self._spec.seed, self.plan.num_kept_axes
        rotations = self.rotations
        if spec.residual == "pca-random" and not self._recipe.budget.is_fixed:
            rotations = mix_unkept(rotations, kept, seed)
        if not spec.is_fitted:
            return rotations
        fitting = Fitting(self._dense, rotations, self._sweep.costs(), kept, seed)
        return fitting.fitted(spec, lambda done, steps: self._report("fit", done - 1, total=steps))

    def output_moments(self, index: int) -> Tensors:
        """Of block `index`, {linear: H}, in the bases that it is rotated into now; empty without feedback between
        rows."""
        return self._sweep.output_moments(index, self._swept, self.rotations)

    def _rotated_dense(self, index: int) -> Tensors:
        """The weights of block `index`, folded and rotated."""
        return self._rotated(index, self._dense.block(index))

    def _running(self, index: int) -> Tensors:
        """The rotated weights of block `index` as plain modules run them."""
        weights = self._rotated_dense(index)
        return online(weights, self._dense.blocks.family, self.rotations.of_block(index))

    @property
    def plan(self) -> Plan:
        """What the stages so far decided."""
        return Plan(self._dense.blocks, self._recipe, self.rotations, self.choices)

    def quantize_blocks(self) -> None:
        """All blocks in order; the finished ones of an earlier run are read back instead of made again."""
        model = self._dense.blocks
        stream = self._stream(self.rotations.residual) if self._recipe.needs_tokens else []
        if stream:
            model.check_sites(self._dense.block(0), self._embed(self._ids[:1, :MAX_TOKENS], None))
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
            self._advance(index, streams, outputs, tensors)
            release_freed_memory()
            self._report("blocks", index, _mean_db(self.reports, len(values["reports"])))
        self._dense_outputs = streams.moments

    def tune_model(self) -> None:
        """All blocks together, if the recipe says so."""
        if not self._recipe.tune.model_steps:
            return
        gain, head = self._final()
        embedded = torch.cat(self._stream(self.rotations.residual))
        dense, self._dense_outputs = torch.cat(self._dense_outputs), []  # of use to nobody else
        release_freed_memory()
        self.divergence = tune_whole_model(
            self._dense,
            [self.plan.formats(i) for i in range(self._dense.blocks.sizes.num_blocks)],
            Predictions(embedded, dense, gain, head),
            self._recipe.tune,
            self._spec.seed,
            self._work,
            self._tuned_a_step,
        )

    def _tuned_a_step(self, done: int, steps: int) -> None:
        release_freed_memory()
        self._report("tuning", done - 1, total=steps)

    def quantize_head(self) -> None:
        """The output head, if the recipe says so: last, on what the finished blocks make of the text."""
        if not self._recipe.quantizes_head:
            return
        self._dense_outputs = []  # the stream of the finished model takes its place

        def progress(done: int, parts: int) -> None:
            self._report("head", done - 1, total=parts)

        self.reports.append(quantize_head(self._dense, self.plan, self._finished_stream, self._work, progress))

    def _finished_stream(self) -> list[Tensor]:
        """The calibration text behind the last block, through the blocks as they are stored."""
        stream = self._stream(self.rotations.residual)
        for index in range(self._dense.blocks.sizes.num_blocks):
            stored = finished_block(self._work, index)
            self._through(index, stream, runnable(stored, self.plan.formats(index)))
            release_freed_memory()
        return stream

    def _advance(self, index: int, streams: Streams, outputs: list[Tensor], stored: Tensors) -> None:
        """The streams through block `index`: that of the second moments is `outputs` where they are known already."""
        through_quantised = [streams.quantised]
        if outputs:
            streams.moments[:] = outputs
        elif self._recipe.moments == "dense":
            self._through(index, streams.moments, self._running(index))
        else:
            through_quantised.append(streams.moments)
        if any(through_quantised):
            quantised = runnable(stored, self.plan.formats(index))
            for stream in through_quantised:
                self._through(index, stream, quantised)

    def _through(self, index: int, stream: list[Tensor], tensors: Tensors) -> None:
        name = self._dense.blocks.family.block_prefix(index)[:-1]
        for i, hidden in enumerate(stream):
            stream[i] = self._dense.passes.run(index, tensors, hidden)
            if not torch.isfinite(stream[i]).all():
                raise ValueError(f"activations: {name}: got NaN or Inf after quantising it")

    def _quantize_block(self, index: int, streams: Streams) -> list[Tensor]:
        """Save the block; the outputs of the dense one, where they were computed on the way."""
        model, rotations = self._dense.blocks, self.rotations.of_block(index)
        dense, dtype = self._dense.block(index), self._dense.dtype
        weights = self._rotated(index, dense)
        task = BlockTask(
            self._dense.passes,
            index,
            weights,
            self._recipe,
            rotations,
            self.choices[index],
            self._spec.seed,
            dtype,
            self.output_moments(index),
        )
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
        model, get = self._dense.blocks, self._dense.get
        want = model.logits(self._probe.dense, get(self._dense.final_norm_name), get(self._dense.head_name))
        return check_equal(model.logits(self._probe.rotated, *self._final()), want, "logits")

    def _final(self) -> tuple[Tensor, Tensor]:
        """Gain [d] of the final norm and head [vocab, d], in the stream that the quantised model runs in."""
        return final_gain(self._dense, self.rotations), head_rows(self._dense, self.rotations)

    def _embed(self, input_ids: Tensor, residual: Tensor | None) -> Tensor:
        tokens, places = input_ids.unique(return_inverse=True)  # a text has a part of the vocabulary
        rows = self._dense.get_rows(self._dense.embedding_name, tokens)
        return self._dense.blocks.embed(rows if residual is None else rotate_rows(rows, residual), places)

    def _counts(self) -> list[Tensor]:
        """How often each calibration token occurs, in the batches of the stream."""
        counts = torch.bincount(self._ids.flatten())[self._ids]
        return own_share(list(counts.split(self._spec.batch_size)))

    def _stream(self, residual: Tensor | None, most: int | None = None) -> list[Tensor]:
        """Hidden states after the embedding, one tensor [batch, length, hidden] for each of this rank's batches (of the
        first `most`)."""
        batches = own_share(list(self._ids.split(self._spec.batch_size))[:most])
        hidden = self._embed(torch.cat(batches), residual)
        return list(hidden.split([len(batch) for batch in batches]))


def _mean_db(reports: list[LinearReport], last: int) -> float:
    return sum(r.sqnr_db for r in reports[-last:]) / last
