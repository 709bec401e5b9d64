"""Second moments of the inputs of a block's sites, from forward passes through the block."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rosaq.calibrate import (
    BlockModel,
    Gram,
    SiteInput,
    Tokens,
    is_first_rank,
    naming,
    sum_over_ranks,
    token_importance,
)
from rosaq.models import Site
from rosaq.rotation import BlockRotations, rotate_blocks
from rosaq.specs import ImportanceSpec

Tensors = dict[str, Tensor]
_NAMED = 8  # experts that a warning lists


class SiteMoments:
    """`grams`: {site name: second moments [k, k] of its input in the online basis}, for the sites measured so far.
    `importance`: of the tokens, one per batch; made in the first pass, before any of the block's linears is quantised.
    counts: how often each token occurs in the calibration text, batches [batch, length].

    An expert's are those of the tokens routed to it. One that no token of positive importance reached is measured on
    every token of the block instead, as if the router had sent them; that, and experts with fewer tokens than the
    widest of their linears has input channels, whose second moments are singular before damping, are told in a warning.
    """

    def __init__(
        self, model: BlockModel, index: int, rotations: BlockRotations, spec: ImportanceSpec, counts: list[Tensor]
    ) -> None:
        self._model, self._index, self._rotations = model, index, rotations
        self._spec, self._token_counts = spec, counts
        self.importance: list[Tensor | None] = []
        self._counts: dict[str, int] = {}
        self.grams: dict[str, Tensor] = {}

    def measure(
        self,
        weights: Tensors,
        stream: list[Tensor],
        sites: Sequence[Site],
        *,
        to_the_end: bool = False,
    ) -> list[Tensor]:
        """Measure `sites` in one pass of the block with `weights` over `stream`; with `to_the_end` the pass goes on
        after the last of them and the block's outputs are returned, else nothing is."""
        grams, outputs = self._pass(weights, stream, sites, stop=not to_the_end)
        unseen = [site for site in sites if not grams[site.name].has_tokens]
        if unseen and all(site.expert is not None for site in unseen):
            grams |= self._pass(weights, stream, unseen, route_all=True)[0]
        for site in sites:  # one at a time: sums and means of all experts together would be twice the memory
            self.grams[site.name] = grams.pop(site.name).mean()
        self._warn(sites, unseen)
        return outputs

    def expert_tokens(self) -> list[int] | None:
        """Tokens routed to each expert; None where the block has no mixture or nothing was measured."""
        first = [site for site in self._model.family.sites_reading("residual") if site.expert is not None]
        return [self._counts.get(site.name, 0) for site in first] if first and self.grams else None

    def _pass(
        self,
        weights: Tensors,
        stream: list[Tensor],
        sites: Sequence[Site],
        *,
        stop: bool = True,
        route_all: bool = False,
    ) -> tuple[dict[str, Gram], list[Tensor]]:
        first = {site.name: weights[f"{site.linears[0]}.weight"] for site in sites}
        grams = {name: Gram(weight.shape[1], weight.device) for name, weight in first.items()}
        outputs: list[Tensor] = []
        for i, hidden in enumerate(stream):
            is_first = i == len(self.importance)
            ends = stop and not (is_first and self._spec.needs_pass)
            passed = self._model.inputs_of(self._index, weights, hidden, sites, stop=ends, route_all=route_all)
            if is_first:
                self.importance.append(token_importance(hidden, self._spec, self._token_counts[i], passed))
            if not stop:
                assert passed.output is not None
                outputs.append(passed.output)
            for site in sites:
                if site.name in passed.inputs:
                    given = passed.inputs[site.name]
                    if not route_all:
                        self._counts[site.name] = self._counts.get(site.name, 0) + len(given.x)
                    self._add(grams[site.name], site, given, self.importance[i])
        if not route_all:
            self._sum_counts([site for site in sites if site.expert is not None])
        return {name: gram.sum_over_ranks() for name, gram in grams.items()}, outputs

    def _sum_counts(self, sites: Sequence[Site]) -> None:
        """Tokens of experts, on all ranks together."""
        if sites:
            counts = sum_over_ranks(torch.tensor([self._counts.get(site.name, 0) for site in sites]))
            self._counts |= {site.name: int(count) for site, count in zip(sites, counts, strict=True)}

    def _add(self, gram: Gram, site: Site, given: SiteInput, weight: Tensor | None) -> None:
        x = given.x
        if site.name in self._rotations.online:
            x = rotate_blocks(x.float(), self._rotations.online[site.name])  # else rounded again, once mixed
        listens = weight is not None and (not self._spec.sites or site.stage in self._spec.sites)
        with naming(self._name + site.linears[0]):
            gram.add_tokens(Tokens(x, given.of_tokens(weight) if listens and weight is not None else None))

    @property
    def _name(self) -> str:
        return self._model.family.block_prefix(self._index)

    def _warn(self, sites: Sequence[Site], unseen: Sequence[Site]) -> None:
        """Once for each stage of experts: which of them saw too few tokens to know their inputs by."""
        firsts = [site for site in sites if site.expert is not None and site.reads == "residual"]
        sizes = self._model.linear_sizes()
        of_experts = [linear for site in self._model.family.sites if site.expert is not None for linear in site.linears]
        widest = max((sizes[linear][0] for linear in of_experts), default=0)
        few = [site for site in firsts if self._counts.get(site.name, 0) < widest]
        if not few or not is_first_rank():
            return
        named = ", ".join(f"{site.expert} ({self._counts.get(site.name, 0)})" for site in few[:_NAMED])
        more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
        alone = sum(site.reads == "residual" for site in unseen)
        rest = f"; {alone} of them saw none and are measured on every token" if alone else ""
        warnings.warn(
            f"{self._name[:-1]}: got fewer tokens than their {widest} input channels for "
            f"{len(few)} of {len(firsts)} experts: {named}{more}{rest}; need more calibration text (num_sequences, "
            "sequence_length) to measure them well",
            UserWarning,
            stacklevel=2,
        )
