"""Quantise one block, site by site, on the stream of tokens that the blocks before it (already quantised) produce."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens, importance_from_scores
from rosaq.config import LinearFormat, Recipe
from rosaq.layout import dequantize
from rosaq.models import Family, Site
from rosaq.quantizers import energy_index, quantize_weight
from rosaq.rotation import BlockRotations, principal_axes, rotate_blocks

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LinearReport:
    """One quantised linear. sqnr_db: signal to quantisation noise of its output on the calibration tokens, in dB
    (of its weights where `measured_on` is "weights": a recipe without calibration)."""

    name: str
    bits: int
    num_salient: int
    bits_per_weight: float
    sqnr_db: float
    measured_on: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def formats(recipe: Recipe, family: Family, rotations: BlockRotations) -> dict[str, LinearFormat]:
    """The format of every linear of a block, by its path inside the block."""
    quant = recipe.quant
    plain = LinearFormat(quant.bits, quant.group_size, quant.symmetric)
    result: dict[str, LinearFormat] = {}
    for site in family.sites:
        count = recipe.salient.count_at(site.reads)
        fmt = replace(plain, num_salient=count, salient="basis" if count and uses_basis(recipe, site) else "index")
        if site.reads == "hidden" and rotations.mlp_out is not None:
            size = rotations.mlp_out.shape
            fmt = replace(fmt, rotation_blocks=size[0], rotation_size=size[1])
        result |= dict.fromkeys(site.linears, fmt)
    return result


def uses_basis(recipe: Recipe, site: Site) -> bool:
    """True where the salient directions are projections made online: principal directions that cannot be folded."""
    return recipe.salient.by == "eigenvalue" and site.reads == "hidden"


def quantize_block(
    model: BlockModel, index: int, weights: Tensors, stream: list[Tensor], recipe: Recipe, rotations: BlockRotations
) -> tuple[Tensors, list[LinearReport]]:
    """(stored tensors of the block's linears, reports). weights: folded and rotated, float32, not changed.

    True-sequential: each site's second moments come from a forward pass through the quantised sites before it.
    """
    fmts = formats(recipe, model.family, rotations)
    current, stored, reports = dict(weights), Tensors(), list[LinearReport]()
    importance = _importance(model, index, weights, stream, recipe)
    for site in model.family.sites:
        rotation = rotations.mlp_out if site.reads == "hidden" else None
        gram = _site_gram(model, index, current, stream, importance, site, rotation) if stream else None
        done = _quantize_site(site, weights, gram, recipe, rotation)
        for linear, tensors in done.items():
            w, w_hat = weights[f"{linear}.weight"], effective_weight(tensors, fmts[linear], rotated=True)
            reports.append(_report(model, index, linear, w, w_hat, gram, tensors, recipe))
            current[f"{linear}.weight"] = effective_weight(tensors, fmts[linear])
            stored |= {f"{linear}.{name}": tensor for name, tensor in tensors.items()}
            if f"{linear}.bias" in weights:
                stored[f"{linear}.bias"] = weights[f"{linear}.bias"].to(torch.float16)
    return stored, reports


def _importance(
    model: BlockModel, index: int, weights: Tensors, stream: list[Tensor], recipe: Recipe
) -> list[Tensor | None]:
    """Importance [tokens] of every batch of the stream, once per block, before any of its linears is quantised."""
    if recipe.importance.strategy == "uniform":
        return [None] * len(stream)
    scores = (model.attention_received(index, weights, hidden) for hidden in stream)
    return [importance_from_scores(s, recipe.importance.floor).flatten() for s in scores]


def _site_gram(
    model: BlockModel,
    index: int,
    current: Tensors,
    stream: list[Tensor],
    importance: list[Tensor | None],
    site: Site,
    rotation: Tensor | None,
) -> Tensor:
    gram = Gram(current[f"{site.linears[0]}.weight"].shape[1])
    for hidden, weight in zip(stream, importance, strict=True):
        found, _ = model.inputs_of(index, current, hidden, [site])
        x = found[site.name].flatten(0, -2)
        try:
            gram.add_tokens(Tokens(x if rotation is None else rotate_blocks(x, rotation), weight))
        except ValueError as error:
            raise ValueError(f"{model.family.block_prefix(index)}{site.linears[0]}: {error}") from error
    return gram.mean()


def _quantize_site(
    site: Site, weights: Tensors, gram: Tensor | None, recipe: Recipe, rotation: Tensor | None
) -> dict[str, Tensors]:
    """Quantise the linears of a site as one stacked matrix (rows are independent), and cut the result."""
    w = torch.cat([weights[f"{linear}.weight"] for linear in site.linears])
    count = recipe.salient.count_at(site.reads)
    by_basis = bool(count) and uses_basis(recipe, site)
    salient_index = _salient_index(site, gram, recipe, count) if count and not by_basis else None
    tensors = quantize_weight(w, gram, recipe.quant, salient_index)
    if by_basis:
        assert gram is not None
        tensors |= _basis(w, tensors, gram, recipe, count)
    if rotation is not None:
        tensors["rotation"] = rotation
    shared = ("salient_index", "salient_basis", "rotation")
    sizes = [weights[f"{linear}.weight"].shape[0] for linear in site.linears]
    cut = {name: tensor.split(sizes) for name, tensor in tensors.items() if name not in shared}
    return {
        linear: {name: cut[name][i].clone() if name in cut else tensor for name, tensor in tensors.items()}
        for i, linear in enumerate(site.linears)
    }


def _salient_index(site: Site, gram: Tensor | None, recipe: Recipe, count: int) -> Tensor:
    if recipe.salient.by == "eigenvalue" and site.reads == "residual":
        return torch.arange(count)  # the folded rotation puts the principal axes first
    assert gram is not None
    return energy_index(gram, count)  # in principal axes of the heads the channel energies are the eigenvalues


def _basis(w: Tensor, tensors: Tensors, gram: Tensor, recipe: Recipe, count: int) -> Tensors:
    """U = top eigenvectors of gram [k, r] and C = (W - Ŵ) U [n, r]: exact on the span of U, whatever Ŵ is."""
    _, axes = principal_axes(gram)
    basis = axes[:, :count].to(torch.float16)
    w_hat = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), recipe.quant.bits)
    return {"salient_weight": ((w - w_hat).double() @ basis.double()).to(torch.float16), "salient_basis": basis}


def effective_weight(tensors: Tensors, fmt: LinearFormat, *, rotated: bool = False) -> Tensor:
    """The dense [n, k] float32 weight that the stored tensors stand for, acting on x (on t = x R if `rotated`)."""
    w = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), fmt.bits).float()
    if fmt.num_salient and fmt.salient == "index":
        w[:, tensors["salient_index"].long()] += tensors["salient_weight"].float()
    elif fmt.num_salient:
        w += tensors["salient_weight"].float() @ tensors["salient_basis"].float().T
    if fmt.rotation_size and not rotated:
        w = rotate_blocks(w, tensors["rotation"].float().transpose(-1, -2))
    return w


def _report(
    model: BlockModel,
    index: int,
    linear: str,
    w: Tensor,
    w_hat: Tensor,
    gram: Tensor | None,
    tensors: Tensors,
    recipe: Recipe,
) -> LinearReport:
    wide, error = w.double(), (w_hat - w).double()
    if gram is None:
        signal, noise = wide.square().sum(), error.square().sum()
    else:
        signal, noise = ((wide @ gram) * wide).sum(), ((error @ gram) * error).sum()
    return LinearReport(
        name=model.family.block_prefix(index) + linear,
        bits=recipe.quant.bits,
        num_salient=tensors["salient_weight"].shape[1] if "salient_weight" in tensors else 0,
        bits_per_weight=8 * sum(t.nbytes for t in tensors.values()) / w.numel(),
        sqnr_db=float(10 * torch.log10(signal / noise.clamp_min(1e-300))),
        measured_on="weights" if gram is None else "outputs",
    )
