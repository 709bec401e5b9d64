"""Fit the rotations of a run to its weights, and give the norms the gains that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from rosaq.models import Site
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
            for weight in self._stream_weights(index, None):
                if not weight.writes:
                    rows = weight.weight.double()
                    moments += weight.share * (rows.T @ rows) / rows.square().sum().clamp_min(1e-30)
        start = start_basis(moments, rest, generator)

        def batches() -> Iterator[list[StreamWeight]]:
            order: list[int] = []
            for step in range(steps):
                order = order or torch.randperm(blocks, generator=generator).tolist()
                yield list(self._stream_weights(order.pop(), generator))
                progress(step + 1, steps)

        return torch.cat([kept, fit_basis(start, batches(), steps)], 1)

    def _stages(self, index: int) -> Iterator[tuple[list[Site], float]]:
        """(sites, share of the loss) of each stage of a block: a site, or that of all experts."""
        for stage, sites in groupby(self._family.sites, key=lambda site: site.stage):
            yield list(sites), self._costs.shares[index][stage]

    def _stream_weights(self, index: int, generator: torch.Generator | None) -> Iterator[StreamWeight]:
        """Of block `index`: what reads the stream, a stage at once, and what writes into it from hidden layers (heads
        have a rotation of their own). With a generator at most so many of their rows, drawn."""
        block = self._dense.block(index)
        costs = self._costs.of_rows(index)
        for sites, share in self._stages(index):
            if sites[0].reads == "residual":
                rows = self._readers(sites, block, costs)
                yield StreamWeight(_drawn(rows, generator), share)
            writers = [name for site in sites for name in site.linears if name in self._family.writers]
            if sites[0].reads == "hidden" and writers and generator is not None:
                online = self._rotations.online.get(sites[0].name)
                every = [block[f"{name}.weight"] for name in writers]
                turned = every if online is None else [rotate_blocks(w, inverse_transpose(online)) for w in every]
                columns = torch.cat([w.T for w in turned])
                yield StreamWeight(_drawn(columns, generator).T, share, writes=True)

    def _readers(self, sites: list[Site], block: Tensors, costs: Tensors) -> Tensor:
        """Rows [n, d] of all linears of a stage that reads the stream, their norm's gain folded in, each times the root
        of what its errors cost."""
        gain = block[f"{sites[0].norm}.weight"] + self._family.gain_offset
        parts = [
            block[f"{name}.weight"] * gain * costs[name].to(gain).sqrt()[:, None]
            for site in sites
            for name in site.linears
        ]
        return torch.cat(parts)

    def _gains(self, residual: Tensor) -> dict[str, Tensor]:
        """{norm: [blocks, d] float64}: what gives the columns behind it equal energy, as the norm stores it; 1 for the
        axes that are kept."""
        found: dict[str, list[Tensor]] = {}
        for index in range(self._dense.blocks.sizes.num_blocks):
            block, costs = self._dense.block(index), self._costs.of_rows(index)
            for sites, _ in self._stages(index):
                if sites[0].reads == "residual":
                    rows = self._readers(sites, block, costs).double() @ residual[:, self._num_kept :]
                    gain = residual.new_ones(len(residual))
                    gain[self._num_kept :] = even_scales(rows.square().sum(0))
                    stored = (gain - self._family.gain_offset).to(self._dense.dtype).double()
                    found.setdefault(sites[0].norm, []).append(stored + self._family.gain_offset)
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


def _drawn(rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows [n, d], or as many of them as a step looks at."""
    if generator is None or len(rows) <= _AT_ONCE:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_AT_ONCE].to(rows.device)]
