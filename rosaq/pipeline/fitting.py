"""Fit the rotations of a run to its weights, and give the norms the gains that go with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch
from torch import Tensor

from rosaq.models import Reads, Site
from rosaq.pipeline.rotations import Rotations, generator_for
from rosaq.pipeline.source import DenseModel
from rosaq.rotation import (
    StreamWeight,
    even_scales,
    fit_basis,
    fit_heads,
    inverse_transpose,
    rotate_blocks,
    start_basis,
)
from rosaq.specs import RotationSpec

Tensors = dict[str, Tensor]
_AT_ONCE = 3072  # rows (or columns, of a writer) that a step looks at: drawn anew each time where there are more
# Steps for each time that a block is read, where that is more than a step looks at: one of Llama-3-8B's has 436 MB.
_MOST_STEPS = 4


@dataclass(frozen=True)
class Costs:
    """What errors at the linears of the model cost, as the sweep found. of_rows(i): {linear: [n]} of block i, the mean
    squared gradient of the predictions at each output. shares[i]: {stage: share of the rounding loss} of block i."""

    of_rows: Callable[[int], Tensors]
    shares: list[dict[str, float]]


class Fitting:
    """The weights of a model, one block at a time, as rotations see them. num_kept: leading axes of the residual
    stream that stay as they are, because sites keep them in 16 bits."""

    def __init__(self, dense: DenseModel, rotations: Rotations, costs: Costs, num_kept: int, seed: int) -> None:
        self._dense, self._family, self._costs, self._seed = dense, dense.blocks.family, costs, seed
        self._rotations, self._num_kept = rotations, num_kept

    def fitted(self, spec: RotationSpec, progress: Callable[[int, int], None]) -> Rotations:
        """The rotations with those fitted that `spec` says. progress is called with (steps done, steps)."""
        result = self._rotations
        if spec.residual == "pca-fitted":
            residual = self._residual(spec.fit_steps, progress)
            result = replace(result, residual=residual, gains=self._gains(residual))
        if spec.values == "fitted":
            assert result.values is not None
            blocks = range(self._dense.blocks.sizes.num_blocks)
            result = replace(result, values=[self._heads(i, result.residual, result.values[i]) for i in blocks])
        return result

    def _residual(self, steps: int, progress: Callable[[int, int], None]) -> Tensor:
        before, blocks = self._rotations.residual, self._dense.blocks.sizes.num_blocks
        assert before is not None
        kept, rest = before[:, : self._num_kept], before[:, self._num_kept :]
        moments, generator = torch.zeros_like(before), generator_for(self._seed, "fitted")
        for index in range(blocks):
            for _, rows, share in self._reading(index, self._dense.block(index)):
                wide = rows.double()
                moments += share * (wide.T @ wide) / wide.square().sum().clamp_min(1e-30)
        start = start_basis(moments, rest, generator)

        def batches() -> Iterator[list[StreamWeight]]:
            order: list[int] = []
            done = 0
            while done < steps:
                order = order or torch.randperm(blocks, generator=generator).tolist()
                for batch in islice(self._batches(order.pop(), generator), steps - done):
                    yield batch
                    done += 1
                    progress(done, steps)

        return torch.cat([kept, fit_basis(start, batches(), steps)], 1)

    def _batches(self, index: int, generator: torch.Generator) -> Iterator[list[StreamWeight]]:
        """What block `index` has beside the stream, as far as a step looks at it, for one step or a few."""
        block = self._dense.block(index)
        seen = [(rows, share, False) for _, rows, share in self._reading(index, block)]
        seen += [(columns, share, True) for columns, share in self._writing(index, block)]
        del block
        steps = min(_MOST_STEPS, math.ceil(max(len(rows) for rows, _, _ in seen) / _AT_ONCE))
        for _ in range(steps):
            drawn = [(_drawn(rows, generator), share, writes) for rows, share, writes in seen]
            yield [StreamWeight(rows.T if writes else rows, share, writes=writes) for rows, share, writes in drawn]

    def _reading(self, index: int, block: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        """(norm, rows [n, d], share of the loss) of each stage of a block that reads the stream: a site, or that of all
        experts. The rows have the norm's gain folded in, and are each times the root of what its errors cost."""
        costs = self._costs.of_rows(index)
        for stage, sites in self._stages("residual"):
            norm, linears = sites[0].norm, [linear for site in sites for linear in site.linears]
            gain = block[f"{norm}.weight"] + self._family.gain_offset
            rows = [block[f"{name}.weight"] * gain * costs[name].to(gain).sqrt()[:, None] for name in linears]
            yield norm, torch.cat(rows), self._costs.shares[index][stage]

    def _writing(self, index: int, block: Tensors) -> Iterator[tuple[Tensor, float]]:
        """(columns [k, d], share of the loss) of each stage of a block that writes hidden layers into the stream, as
        rotated online. Not of attention: what its heads are rotated by is fitted to its columns."""
        for stage, sites in self._stages("hidden"):
            online = self._rotations.online.get(sites[0].name)
            weights = [block[f"{name}.weight"] for site in sites for name in site.linears]
            if online is not None:
                weights = [rotate_blocks(weight, inverse_transpose(online)) for weight in weights]
            yield torch.cat([weight.T for weight in weights]), self._costs.shares[index][stage]

    def _stages(self, reads: Reads) -> Iterator[tuple[str, list[Site]]]:
        for stage, sites in groupby(self._family.sites_reading(reads), key=lambda site: site.stage):
            yield stage, list(sites)

    def _gains(self, residual: Tensor) -> dict[str, Tensor]:
        """{norm: [blocks, d] float64}: what gives the columns behind it equal energy, as the norm stores it; 1 for the
        axes that are kept."""
        found: dict[str, list[Tensor]] = {}
        for index in range(self._dense.blocks.sizes.num_blocks):
            for norm, rows, _ in self._reading(index, self._dense.block(index)):
                turned = rows.double() @ residual[:, self._num_kept :]
                gain = residual.new_ones(len(residual))
                gain[self._num_kept :] = even_scales(turned.square().sum(0))
                stored = (gain - self._family.gain_offset).to(self._dense.dtype).double()
                found.setdefault(norm, []).append(stored + self._family.gain_offset)
        return {norm: torch.stack(gains) for norm, gains in found.items()}

    def _heads(self, index: int, residual: Tensor | None, start: Tensor) -> Tensor:
        """T [kv heads, d, d] of block `index`, fitted to the rows of what reads the heads, as they enter the stream."""
        sizes, block = self._dense.blocks.sizes, self._dense.block(index)
        readers = [name for site in self._family.sites_reading("values") for name in site.linears]
        rows = torch.cat([block[f"{name}.weight"].double() for name in readers])
        if residual is not None:
            rows = residual.T @ rows
        group = sizes.num_heads // sizes.num_kv_heads
        return fit_heads(rows.unflatten(1, (sizes.num_kv_heads, group, sizes.head_dim)), start)


def _drawn(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows [n, d], or as many of them as a step looks at."""
    if len(rows) <= _AT_ONCE:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_AT_ONCE].to(rows.device)]
