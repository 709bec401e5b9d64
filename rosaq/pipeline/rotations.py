"""Choose the rotations of a run: draw the random ones, and measure principal axes where the recipe wants them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens, mean_over_ranks, naming, token_importance
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.source import DenseModel
from rosaq.rotation import (
    BlockRotations,
    fold_norms,
    pca_random_tail,
    principal_axes,
    random_orthogonal,
    shared_hadamard_block,
)
from rosaq.specs import Recipe

_SINK = 256  # times the median energy
_ONLINE, _GAINS = "online.", "gains."


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [d] of the residual stream's second moments, descending: of all tokens, and without attention sinks
    (None where nothing else was left); sink_share: of the tokens, over all blocks."""

    all_tokens: Tensor
    without_sinks: Tensor | None
    sink_share: float

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        without = None if self.without_sinks is None else self.without_sinks.tolist()
        return {"all_tokens": self.all_tokens.tolist(), "without_sinks": without, "sink_share": self.sink_share}


@dataclass(frozen=True)
class Rotations:
    """residual [d, d] float64, shared by all blocks; values[i] [num_kv_heads, head_dim, head_dim] float64 of block i;
    online {site name: [1, b, b] float16}, the same in every block; of the head too; gains {norm: [num_blocks, d]
    float64}, as in `BlockRotations`. spectrum: None without PCA."""

    residual: Tensor | None = None
    values: list[Tensor] | None = None
    online: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    spectrum: Spectrum | None = None

    def of_block(self, index: int) -> BlockRotations:
        gains = {norm: gain[index] for norm, gain in self.gains.items()}
        return BlockRotations(self.residual, self.values[index] if self.values else None, self.online, gains)

    def to(self, device: torch.device) -> Rotations:
        """These, on `device`: random ones are drawn on the CPU, so that a seed means the same everywhere."""
        return Rotations(
            None if self.residual is None else self.residual.to(device),
            None if self.values is None else [value.to(device) for value in self.values],
            {site: block.to(device) for site, block in self.online.items()},
            {norm: gain.to(device) for norm, gain in self.gains.items()},
            self.spectrum,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """For the workspace; inverse of `from_tensors`."""
        named = {"residual": self.residual}
        if self.spectrum is not None:
            named |= {"spectrum": self.spectrum.all_tokens, "calm_spectrum": self.spectrum.without_sinks}
            named["sink_share"] = torch.tensor(self.spectrum.sink_share, dtype=torch.float64)
        named |= {f"{_ONLINE}{site}": block for site, block in self.online.items()}
        named |= {f"{_GAINS}{norm}": gain for norm, gain in self.gains.items()}
        if self.values:
            named["values"] = torch.stack(self.values)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rotations:
        values = list(tensors["values"]) if "values" in tensors else None
        online, gains = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (_ONLINE, _GAINS)
        )
        spectrum = None
        if "spectrum" in tensors:
            spectrum = Spectrum(tensors["spectrum"], tensors.get("calm_spectrum"), float(tensors["sink_share"]))
        return cls(tensors.get("residual"), values, online, gains, spectrum)


def choose_rotations(
    model: DenseModel,
    recipe: Recipe,
    stream: list[Tensor],
    counts: list[Tensor],
    seed: int,
    progress: Callable[[int], None],
) -> Rotations:
    """The rotations of every block. stream: hidden states [batch, length, d] after the embedding, and the counts
    [batch, length] of their tokens (needed for PCA only). progress is called with each block that was measured."""
    spec, sizes = recipe.rotation, model.blocks.sizes
    grams = (
        _measure(model, recipe, stream, counts, progress) if "pca" in spec.residual or spec.values == "pca" else None
    )
    residual, values, spectrum = None, None, None
    if spec.residual == "random":
        residual = random_orthogonal(sizes.hidden, generator_for(seed, "residual"))
    elif "pca" in spec.residual:
        assert grams is not None
        eigenvalues, axes = principal_axes(grams.residual)
        without = None if grams.calm is None else torch.linalg.eigvalsh(grams.calm).flip(0)
        spectrum = Spectrum(eigenvalues, without, grams.sink_share)
        num_principal = recipe.most_salient_at("residual")
        if not recipe.budget.is_fixed:
            num_principal = min(num_principal, sizes.hidden // 4)
        residual = axes
        if spec.residual != "pca":
            residual = pca_random_tail(axes, num_principal, generator_for(seed, "residual"))
    if spec.values in ("random", "fitted"):  # what is fitted starts from there
        heads = range(sizes.num_blocks * sizes.num_kv_heads)
        drawn = [random_orthogonal(sizes.head_dim, generator_for(seed, f"values.{head}")) for head in heads]
        values = list(torch.stack(drawn).unflatten(0, (sizes.num_blocks, sizes.num_kv_heads)))
    elif spec.values == "pca":
        assert grams is not None
        values = [torch.stack([principal_axes(gram)[1] for gram in block]) for block in grams.values]
    return Rotations(residual, values, online_blocks(model.blocks, recipe), spectrum=spectrum).to(model.device)


def mix_unkept(rotations: Rotations, num_kept: int, seed: int) -> Rotations:
    """The same with principal axes from number `num_kept` on mixed into the rest of the residual stream's basis.

    The directions before stay what they are, so what a budget knows of the sites (their second moments with the first
    0, 1, ... directions kept) stays true.
    """
    assert rotations.residual is not None
    kept, rest = rotations.residual[:, :num_kept], rotations.residual[:, num_kept:]
    mixed = rest @ random_orthogonal(rest.shape[1], generator_for(seed, "unkept")).to(rest)
    return replace(rotations, residual=torch.cat([kept, mixed], dim=1))


def online_blocks(model: BlockModel, recipe: Recipe) -> dict[str, Tensor]:
    """{site name: Hadamard block [1, b, b]} where the recipe rotates inputs online. The linears of a site share theirs,
    so the one with the fewest rows decides what it may cost."""
    wanted = {"residual": recipe.rotation.residual, "hidden": recipe.rotation.mlp_out}
    sizes, sites = model.linear_sizes(), model.family.sites
    if recipe.quantizes_head:
        sizes, sites = (
            sizes | {model.family.head: model.head_size()},
            (*sites, model.family.head_site),
        )
    result = {}
    for site in sites:
        if wanted.get(site.reads) == "hadamard":
            rows = min(sizes[linear][1] for linear in site.linears)
            result[site.name] = shared_hadamard_block(sizes[site.linears[0]][0], rows)
    return result


@dataclass(frozen=True)
class _Grams:
    residual: Tensor  # [d, d], averaged over all sites that read the residual stream
    calm: Tensor | None  # the same without the sinks; None where nothing else is left
    sink_share: float
    values: list[Tensor]  # per block [num_kv_heads, head_dim, head_dim]


def _measure(
    model: DenseModel, recipe: Recipe, stream: list[Tensor], counts: list[Tensor], progress: Callable[[int], None]
) -> _Grams:
    """Second moments of the dense model's normalised residual stream and value heads, over all blocks.

    Importance counts here too: an attention sink is one token of hundreds, and plain second moments give its direction
    no principal axis (DESIGN.md, "The sink is a salient direction").
    """
    family, sizes = model.blocks.family, model.blocks.sizes
    # one expert stands for the router, which every token goes through
    wanted = [site for site in family.sites_reading("residual") if not site.expert]
    if recipe.rotation.values == "pca":
        wanted += family.sites_reading("values")
    residual, sinks, values = Gram(sizes.hidden, model.device), Gram(sizes.hidden, model.device), []
    num_sinks, num_tokens = 0, 0
    for index in range(sizes.num_blocks):
        weights = fold_norms(model.block(index), family)
        heads = [Gram(sizes.head_dim, model.device) for _ in range(sizes.num_kv_heads)]
        for i, hidden in enumerate(stream):
            loud = is_sink(hidden).flatten().nonzero().flatten()
            num_sinks, num_tokens = num_sinks + len(loud), num_tokens + hidden[..., 0].numel()
            passed = model.passes.inputs_of(index, weights, hidden, wanted, stop=False, route_all=True)
            importance = token_importance(hidden, recipe.importance, counts[i], passed)
            assert passed.output is not None
            stream[i] = passed.output
            for site in wanted:
                x = passed.inputs[site.name].x
                with naming(family.block_prefix(index) + site.linears[0]):
                    if site.reads == "residual":
                        tokens = Tokens(x, importance)
                        residual.add_tokens(tokens)
                        sinks.add_tokens(tokens.reordered(loud))
                    else:
                        add_value_heads(heads, Tokens(x, importance), sizes.head_dim)
        if recipe.rotation.values == "pca":
            values.append(torch.stack([gram.sum_over_ranks().mean() for gram in heads]))
        release_freed_memory()
        progress(index)
    residual, sinks = residual.sum_over_ranks(), sinks.sum_over_ranks()
    calm = residual.without(sinks)
    sink_share = mean_over_ranks(num_sinks / num_tokens)
    return _Grams(residual.mean(), calm.mean() if calm.has_tokens else None, sink_share, values)


def is_sink(hidden: Tensor) -> Tensor:
    """bool [batch, length]: tokens whose vector in hidden [batch, length, d] has over 256 times the median energy of
    its batch, as attention sinks and other massive activations do."""
    energy = hidden.square().sum(-1)
    return energy > _SINK * energy.median()


def add_value_heads(grams: list[Gram], tokens: Tokens, head_dim: int) -> None:
    """Add attention outputs [tokens, num_heads * head_dim] to the second moments of their key-value heads."""
    per_kv = tokens.x.unflatten(1, (len(grams), -1, head_dim))  # query heads of one key-value head are adjacent
    importance = tokens.importance
    if importance is not None:  # a token counts the same in all of them
        importance = importance.repeat_interleave(per_kv.shape[2])
    for kv, gram in enumerate(grams):
        gram.add_tokens(Tokens(per_kv[:, kv].flatten(0, 1), importance))


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A stream of random numbers of its own for each purpose, so that one draw more here changes nothing there."""
    return torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(purpose.encode()))
