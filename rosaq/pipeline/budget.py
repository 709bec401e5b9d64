"""Share bits, 16-bit directions and smaller groups out between the sites of all blocks, by what each of them buys.

The price of a site is what GPTQ is expected to leave of it: sensitivity to its errors, times the squared step of its
grid, times the geometric mean of the second moments that are not kept (the product of the conditional variances is the
determinant, so error feedback leaves every channel about that much). One more bit divides the squared step by 4.6; one
more direction takes the largest eigenvalue out of the mean. Whatever takes most off the sum for its bits comes next.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from rosaq.config import LinearFormat
from rosaq.models import Family
from rosaq.quantizers import damped_copies, damping_term
from rosaq.specs import BudgetSpec, QuantSpec, Recipe


@dataclass(frozen=True, order=True)
class SiteChoice:
    """Width of the codes, number of 16-bit directions and group size (-1: a row) of one site of one block, or of one
    stage of it."""

    bits: int
    num_salient: int
    group_size: int


Choices = list[dict[str, SiteChoice]]  # one dict per block: {name of a site or stage: its choice}


def same_everywhere(recipe: Recipe, family: Family, num_blocks: int) -> Choices:
    """What a recipe without a budget gives to every block."""
    salient, quant = recipe.salient, recipe.quant
    block = {site.name: SiteChoice(quant.bits, salient.count_at(site.reads), quant.group_size) for site in family.sites}
    return [block] * num_blocks


@dataclass(frozen=True)
class SiteFacts:
    """One stage of one block, as far as bits are concerned: one site, or the same site of all experts of a mixture,
    which get the same width and number of directions.

    sizes           (k, n) of each of its linears.
    base            their format, of which bits, num_salient and group_size are to be chosen.
    sensitivity     what errors of variance 1 in all its outputs cost (any unit, the same for all).
    squared_step    {(bits, group_size): mean squared step of the grid}, of every width and group size it may have.
    kept            [most] second moments of the directions that may be kept, largest first.
    log_rest        [most + 1] sum of the logs of the second moments that are left with 0, 1, ... directions kept.
    energy          trace of the second moments.
    """

    sizes: tuple[tuple[int, int], ...]
    base: LinearFormat
    sensitivity: float
    squared_step: dict[tuple[int, int], float]
    kept: Tensor
    log_rest: Tensor
    energy: float

    @property
    def num_weights(self) -> int:
        return sum(k * n for k, n in self.sizes)

    def loss(self, choice: SiteChoice) -> float:
        """Expected cost of the site's rounding errors; more directions than may be kept count as that many."""
        kept = min(choice.num_salient, len(self.kept))
        left = self.sizes[0][0] - kept
        variance = float(torch.exp(self.log_rest[kept] / left))
        return self.sensitivity * left * variance * self.squared_step[choice.bits, choice.group_size] / 12

    def bits(self, choice: SiteChoice) -> int:
        """Bits of every tensor of its linears, as `bits_per_weight` counts them."""
        fmt = replace(self.base, **asdict(choice))
        return sum(stored_bits(fmt, k, n) for k, n in self.sizes)

    def smaller_groups(self, now: SiteChoice) -> list[int]:
        """Group sizes below that of `now` that it may have with codes as wide."""
        k = self.sizes[0][0]
        row = k if now.group_size == -1 else now.group_size
        return sorted((size for bits, size in self.squared_step if bits == now.bits and 0 < size < row), reverse=True)

    def largest(self, spec: BudgetSpec, group_size: int) -> SiteChoice:
        """The choice of the most bits, where groups of `group_size` are what all widths may have."""
        widest = SiteChoice(max(spec.widths), len(self.kept), group_size)
        return replace(widest, group_size=min(self.smaller_groups(widest), default=group_size))

    def directions_for(self, share: float) -> int:
        """The least number of directions that hold `share` of the energy, at most all that may be kept; none where
        errors cost nothing."""
        if not self.sensitivity:
            return 0
        held = torch.cumsum(self.kept, 0) / self.energy
        return min(len(self.kept), int((held < share).sum()) + 1) if len(self.kept) else 0


def stored_bits(fmt: LinearFormat, in_features: int, out_features: int) -> int:
    """Bits of all tensors of a linear but its bias."""
    total = 0
    for shape, dtype in fmt.tensor_shapes(in_features, out_features).values():
        total += 8 * getattr(torch, dtype).itemsize * torch.Size(shape).numel()
    return total


def check_in_reach(target_bits: float, least: float, most: float) -> None:
    """ValueError naming the range where no choice of widths, directions and groups has so many bits per weight."""
    if not least <= target_bits <= most:
        raise ValueError(
            f"target_bits: got {target_bits}, need {least:.3f} to {most:.3f} for this model, or bits for one width"
        )


def share_out(facts: list[dict[str, SiteFacts]], spec: BudgetSpec, quant: QuantSpec) -> Choices:
    """The choices for all stages: under `spec.target_bits`, or directions by `spec.energy` at the width of `quant`.

    ValueError naming the reachable range if the budget cannot be met.
    """
    if spec.target_bits is None:
        assert spec.energy is not None
        share = spec.energy
        return [
            {s: SiteChoice(quant.bits, f.directions_for(share), quant.group_size) for s, f in block.items()}
            for block in facts
        ]
    sites = {(i, name): fact for i, block in enumerate(facts) for name, fact in block.items()}
    chosen = {key: SiteChoice(min(spec.widths), 0, quant.group_size) for key in sites}
    weights = sum(fact.num_weights for fact in sites.values())
    least = sum(fact.bits(chosen[key]) for key, fact in sites.items())
    most = sum(fact.bits(fact.largest(spec, quant.group_size)) for fact in sites.values())
    check_in_reach(spec.target_bits, least / weights, most / weights)
    left = spec.target_bits * weights - least
    waiting = [entry for key in sites for entry in _steps(key, sites[key], chosen[key], spec)]
    heapq.heapify(waiting)
    while waiting:
        _, _, key, before, after = heapq.heappop(waiting)
        if chosen[key] != before:  # offered before another step of the same site was taken
            continue
        cost = sites[key].bits(after) - sites[key].bits(before)
        if cost > left:
            continue
        left -= cost
        chosen[key] = after
        for entry in _steps(key, sites[key], after, spec):
            heapq.heappush(waiting, entry)
    return [{name: chosen[i, name] for name in block} for i, block in enumerate(facts)]


_Key = tuple[int, str]
_Step = tuple[float, int, _Key, SiteChoice, SiteChoice]


def _steps(key: _Key, fact: SiteFacts, now: SiteChoice, spec: BudgetSpec) -> list[_Step]:
    """What a site could do next, by the loss saved for each bit (negative: heaps give the smallest)."""
    nexts = [replace(now, bits=bits) for bits in spec.widths if bits > now.bits][:1]
    nexts += [replace(now, num_salient=count) for count in range(now.num_salient + 1, len(fact.kept) + 1)]
    nexts += [replace(now, group_size=size) for size in fact.smaller_groups(now)]
    result: list[_Step] = []
    for number, after in enumerate(nexts):
        saved = fact.loss(now) - fact.loss(after)
        if saved > 0:
            result.append((-saved / (fact.bits(after) - fact.bits(now)), number, key, now, after))
    return result


def spectrum_of(gram: Tensor, most: int, damping: float, order: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """(kept, log_rest, energy) of `SiteFacts`, on the CPU, from second moments gram [k, k] float64.

    order: the channels that would be kept, first to last ([most]); None: the principal directions of gram.
    """
    k, energy = len(gram), float(torch.diagonal(gram).sum())
    if order is None and most:
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        logs = torch.log(values + damping_term(values[most:].mean(), damping))
        rest = logs.sum() - torch.cat([logs.new_zeros(1), torch.cumsum(logs[:most], 0)])
        return values[:most].cpu(), rest.cpu(), energy
    is_kept = torch.zeros(k, dtype=torch.bool, device=gram.device)
    order = gram.new_empty(0, dtype=torch.int64) if order is None else order  # a determinant needs no eigenvalues
    is_kept[order] = True
    bulk = torch.nonzero(~is_kept).flatten()
    arranged = torch.cat([bulk, order.flip(0)])  # whoever is kept first stands last, so each K is a leading part
    for damped in damped_copies(gram[arranged][:, arranged], torch.diagonal(gram)[bulk].mean(), damping):
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item() == 0:
            break
    sums = torch.cumsum(2 * torch.log(torch.diagonal(lower)), 0)
    rest = torch.stack([sums[k - count - 1] for count in range(most + 1)])
    return torch.diagonal(gram)[order].cpu(), rest.cpu(), energy


def grids_of(recipe: Recipe, in_features: int) -> list[tuple[int, int]]:
    """(bits, group_size) that a site of `in_features` channels may have, the smallest groups last."""
    quant, budget = recipe.quant, recipe.budget
    row = in_features if quant.group_size == -1 else quant.group_size
    smaller = [size for size in sorted(budget.group_sizes, reverse=True) if size < row and in_features % size == 0]
    widths = sorted({*budget.widths, quant.bits})
    return [(bits, quant.group_size) for bits in widths] + [(max(budget.widths), size) for size in smaller]


def squared_steps(
    weights: list[Tensor], grids: Iterable[tuple[int, int]], is_symmetric: bool
) -> dict[tuple[int, int], float]:
    """{(bits, group_size): mean squared step} of the grids that span each group of `weights` [n, k], before any
    clipping."""
    grids = list(grids)
    squared = {size: _squared_span(weights, size, is_symmetric) for size in {size for _, size in grids}}
    return {(bits, size): squared[size] / (2**bits - 1) ** 2 for bits, size in grids}


def _squared_span(weights: list[Tensor], group_size: int, is_symmetric: bool) -> float:
    spans = []
    for weight in weights:
        groups = weight.view(len(weight), -1, weight.shape[1] if group_size == -1 else group_size)
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        spans.append(2 * torch.maximum(-low, high) if is_symmetric else high - low)
    return float(torch.cat([span.flatten() for span in spans]).double().square().mean())
