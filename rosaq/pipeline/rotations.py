"""Choose the rotations of a run: draw the random ones, and measure principal axes where the recipe wants them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.calibrate import Gram, Tokens, token_importance
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


@dataclass(frozen=True)
class Rotations:
    """residual [d, d] float64, shared by all blocks; values[i] [num_kv_heads, head_dim, head_dim] float64 of block i;
    mlp_out [1, b, b] float16. spectrum: eigenvalues of the residual second moments, descending (PCA only)."""

    residual: Tensor | None
    values: list[Tensor] | None
    mlp_out: Tensor | None
    spectrum: Tensor | None

    def of_block(self, index: int) -> BlockRotations:
        return BlockRotations(self.residual, self.values[index] if self.values else None, self.mlp_out)

    def to_tensors(self) -> dict[str, Tensor]:
        """For the workspace; inverse of `from_tensors`."""
        named = {"residual": self.residual, "mlp_out": self.mlp_out, "spectrum": self.spectrum}
        if self.values:
            named["values"] = torch.stack(self.values)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rotations:
        values = list(tensors["values"]) if "values" in tensors else None
        return cls(tensors.get("residual"), values, tensors.get("mlp_out"), tensors.get("spectrum"))


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
    residual, spectrum, values = None, None, None
    if spec.residual == "random":
        residual = random_orthogonal(sizes.hidden, _generator(seed, "residual"))
    elif spec.residual != "none":
        assert grams is not None
        spectrum, axes = principal_axes(grams.residual)
        num_principal = recipe.salient.count_at("residual")
        tail = pca_random_tail(grams.residual, num_principal, _generator(seed, "residual"))
        residual = axes if spec.residual == "pca" else tail
    if spec.values == "random":
        heads = range(sizes.num_blocks * sizes.num_kv_heads)
        drawn = [random_orthogonal(sizes.head_dim, _generator(seed, f"values.{head}")) for head in heads]
        values = list(torch.stack(drawn).unflatten(0, (sizes.num_blocks, sizes.num_kv_heads)))
    elif spec.values == "pca":
        assert grams is not None
        values = [torch.stack([principal_axes(gram)[1] for gram in block]) for block in grams.values]
    mlp_out = None
    if spec.mlp_out == "hadamard":
        site = model.blocks.family.site_reading("hidden")
        mlp_out = shared_hadamard_block(*model.blocks.linear_sizes()[site.linears[0]])
    return Rotations(residual, values, mlp_out, spectrum)


@dataclass(frozen=True)
class _Grams:
    residual: Tensor  # [d, d], averaged over all sites that read the residual stream
    values: list[Tensor]  # per block [num_kv_heads, head_dim, head_dim]


def _measure(
    model: DenseModel, recipe: Recipe, stream: list[Tensor], counts: list[Tensor], progress: Callable[[int], None]
) -> _Grams:
    """Second moments of the dense model's normalised residual stream and value heads, over all blocks.

    Importance counts here too: an attention sink is one token of hundreds, and plain second moments give its direction
    no principal axis (DESIGN.md, "The sink is a salient direction").
    """
    family, sizes = model.blocks.family, model.blocks.sizes
    wanted = [site for site in family.sites if site.reads == "residual"]
    if recipe.rotation.values == "pca":
        wanted.append(family.site_reading("values"))
    residual, values = Gram(sizes.hidden), []
    for index in range(sizes.num_blocks):
        weights = fold_norms(model.block(index), family)
        heads = [Gram(sizes.head_dim) for _ in range(sizes.num_kv_heads)]
        for i, hidden in enumerate(stream):
            importance = token_importance(model.blocks, index, weights, hidden, recipe.importance, counts[i])
            inputs, out = model.blocks.inputs_of(index, weights, hidden, wanted, stop=False)
            assert out is not None
            stream[i] = out
            for site in wanted:
                x = inputs[site.name].flatten(0, -2)
                if site.reads == "residual":
                    residual.add_tokens(Tokens(x, importance))
                else:
                    _add_heads(heads, x, sizes.head_dim)
        if recipe.rotation.values == "pca":
            values.append(torch.stack([gram.mean() for gram in heads]))
        progress(index)
    return _Grams(residual.mean(), values)


def _add_heads(grams: list[Gram], x: Tensor, head_dim: int) -> None:
    """Add attention outputs x [tokens, num_heads * head_dim] to the second moments of their key-value heads."""
    per_kv = x.unflatten(1, (len(grams), -1, head_dim))  # query heads of one key-value head are adjacent
    for kv, gram in enumerate(grams):
        gram.add_tokens(Tokens(per_kv[:, kv].flatten(0, 1)))


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A stream of random numbers of its own for each purpose, so that one draw more here changes nothing there."""
    return torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(purpose.encode()))
