"""One site from weights to stored tensors: the same code for the sites of a block and for the output head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rosaq.config import LinearFormat, SalientKind
from rosaq.layout import dense_weight
from rosaq.models import Site
from rosaq.pipeline.budget import SiteChoice
from rosaq.quantizers import (
    NotPositiveDefiniteError,
    RowFeedback,
    energy_index,
    quantize_in_axes,
    quantize_weight,
    quantize_with_basis,
)
from rosaq.specs import Recipe

Tensors = dict[str, Tensor]
_MOST_RATIO = 1e30
SHARED = ("salient_index", "salient_basis", "rotation")  # act on the site's input; all other tensors have a row a row


@dataclass(frozen=True)
class LinearReport:
    """One quantised linear. sqnr_db: signal to quantisation noise of its output on the calibration tokens, in dB
    (of its weights where `measured_on` is "weights": a recipe without calibration); 300 where nothing is lost."""

    name: str
    bits: int
    num_salient: int
    bits_per_weight: float
    sqnr_db: float
    measured_on: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SitePlan:
    """How one site is quantised: by `recipe`, with the width, directions and groups of `choice`. rotation
    [B, b, b] float16: made online at its input, None where the recipe makes none there."""

    site: Site
    recipe: Recipe
    choice: SiteChoice
    rotation: Tensor | None

    @property
    def is_in_axes(self) -> bool:
        """True where the rotation is made with the codes: the site's own principal axes."""
        return self.recipe.rotation.is_dense(self.site.reads)

    @property
    def is_basis(self) -> bool:
        """True where its directions are projections made online."""
        return bool(self.choice.num_salient) and self.recipe.salient.is_basis(self.site.reads)

    def format(self, in_features: int) -> LinearFormat:
        """What each of its linears stores."""
        quant, choice = self.recipe.quant, self.choice
        kind: SalientKind = "basis" if self.is_basis else "index"
        fmt = LinearFormat(choice.bits, choice.group_size, quant.symmetric, choice.num_salient, kind)
        if self.rotation is not None:
            return replace(fmt, rotation_blocks=self.rotation.shape[0], rotation_size=self.rotation.shape[1])
        return replace(fmt, rotation_blocks=1, rotation_size=in_features) if self.is_in_axes else fmt

    def quantize(self, w: Tensor, gram: Tensor | None, name: str, feedback: RowFeedback | None = None) -> Tensors:
        """Rows w [n, k] float32, folded and rotated, and second moments gram [k, k] of the input in the online basis
        (None: a recipe without calibration) -> the tensors of the disk layout. Rows are independent given gram, but
        for `feedback`.

        Raises ValueError (NotPositiveDefiniteError with `name`) as the quantisers do.
        """
        choice, count = self.choice, self.choice.num_salient
        quant = replace(self.recipe.quant, bits=choice.bits, group_size=choice.group_size)
        try:
            if self.is_in_axes:
                assert gram is not None
                tensors = quantize_in_axes(w, gram, quant, count)
            elif self.is_basis:
                assert gram is not None
                tensors = quantize_with_basis(w, gram, quant, count, feedback)
            else:
                index = salient_index(self.site, gram, self.recipe, count) if count else None
                tensors = quantize_weight(w, gram, quant, index, feedback)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"{name}: {error}") from error
        return tensors if self.rotation is None else tensors | {"rotation": self.rotation}

    def energies(self, w: Tensor, tensors: Tensors, gram: Tensor | None) -> Tensor:
        """(signal, noise) float64 [2] of rows w [n, k] stored as `tensors`, summed over the rows: of their outputs, or
        of the weights where there is no gram."""
        fmt = self.format(w.shape[1])
        wide, error = w.double(), (dense_weight(tensors, fmt, rotated=not self.is_in_axes) - w).double()
        if gram is None:
            return torch.stack([wide.square().sum(), error.square().sum()])
        return torch.stack([((wide @ gram) * wide).sum(), ((error @ gram) * error).sum()])

    def report(
        self, name: str, tensors: Tensors, num_weights: int, energies: Tensor, gram: Tensor | None
    ) -> LinearReport:
        """What `tensors` store of a linear with so many weights, and their `energies` over all of its rows."""
        signal, noise = energies.tolist()
        ratio = signal / noise if noise else math.inf  # a linear of zeros is stored as it is, too
        return LinearReport(
            name=name,
            bits=self.choice.bits,
            num_salient=self.choice.num_salient,
            bits_per_weight=8 * sum(t.nbytes for t in tensors.values()) / num_weights,
            sqnr_db=10 * math.log10(min(max(ratio, 1 / _MOST_RATIO), _MOST_RATIO)),
            measured_on="weights" if gram is None else "outputs",
        )


def salient_index(site: Site, gram: Tensor | None, recipe: Recipe, count: int) -> Tensor:
    """The channels of a site's input that stay in 16 bits, ascending int64 [count]."""
    return salient_order(site, gram, recipe, count).sort().values


def salient_order(site: Site, gram: Tensor | None, recipe: Recipe, count: int) -> Tensor:
    """The same channels in the order in which more of them would be kept: of any count, the first ones of this."""
    if recipe.salient.by == "eigenvalue" and site.reads == "residual" and "pca" in recipe.rotation.residual:
        # the folded rotation puts the principal axes first
        return torch.arange(count, device=None if gram is None else gram.device)
    assert gram is not None
    index = energy_index(gram, count)  # in principal axes of the heads the channel energies are the eigenvalues
    return index[torch.diagonal(gram)[index].argsort(descending=True, stable=True)]
