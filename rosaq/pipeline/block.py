"""Quantise one block, site by site, on the stream of tokens that the blocks before it (already quantised) produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens, token_importance
from rosaq.config import LinearFormat, Recipe
from rosaq.layout import dequantize
from rosaq.models import Family, Site
from rosaq.quantizers import energy_index, quantize_weight, quantize_with_basis
from rosaq.rotation import BlockRotations, rotate_blocks

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
        fmt = replace(
            plain, num_salient=count, salient="basis" if count and recipe.salient.is_basis(site.reads) else "index"
        )
        if site.reads == "hidden" and rotations.mlp_out is not None:
            size = rotations.mlp_out.shape
            fmt = replace(fmt, rotation_blocks=size[0], rotation_size=size[1])
        result |= dict.fromkeys(site.linears, fmt)
    return result


@dataclass(frozen=True)
class BlockResult:
    """stored: the tensors of the block's linears, as in the checkpoint. reports: one per linear."""

    stored: Tensors
    reports: list[LinearReport]


def quantize_block(
    model: BlockModel, index: int, weights: Tensors, stream: list[Tensor], recipe: Recipe, rotations: BlockRotations
) -> BlockResult:
    """Quantise the linears of one block. weights: folded and rotated, float32, not changed. stream: the tokens that
    enter it, of the model that `recipe.moments` names; empty for a recipe without calibration.

    On the dense stream one forward pass serves all sites. On the quantised one they are true-sequential: each site's
    second moments come from a forward pass through the quantised sites before it.
    """
    fmts = formats(recipe, model.family, rotations)
    current, stored, reports = online(weights, model.family, rotations), Tensors(), list[LinearReport]()
    # once per block, before any of its linears is quantised
    importance = [token_importance(model, index, current, hidden, recipe.importance) for hidden in stream]

    def measure(*sites: Site) -> dict[str, Tensor]:
        return _grams(model, index, current, stream, importance, sites, rotations) if stream else {}

    grams = measure(*model.family.sites) if recipe.moments == "dense" else {}
    for site in model.family.sites:
        gram = (grams or measure(site)).get(site.name)
        done = _quantize_site(site, weights, gram, recipe, rotations.mlp_out if site.reads == "hidden" else None)
        for linear, tensors in done.items():
            w, w_hat = weights[f"{linear}.weight"], effective_weight(tensors, fmts[linear], rotated=True)
            reports.append(_report(model, index, linear, w, w_hat, gram, tensors, fmts[linear]))
            current[f"{linear}.weight"] = effective_weight(tensors, fmts[linear])
            stored |= {f"{linear}.{name}": tensor for name, tensor in tensors.items()}
            if f"{linear}.bias" in weights:
                stored[f"{linear}.bias"] = weights[f"{linear}.bias"].to(torch.float16)
    return BlockResult(stored, reports)


def online(weights: Tensors, family: Family, rotations: BlockRotations) -> Tensors:
    """A copy of a rotated block's weights as plain modules run them: the online rotation is inside the weights."""
    result = dict(weights)
    if rotations.mlp_out is not None:
        back = rotations.mlp_out.float().transpose(-1, -2)
        for linear in family.site_reading("hidden").linears:
            result[f"{linear}.weight"] = rotate_blocks(weights[f"{linear}.weight"], back)
    return result


def _grams(
    model: BlockModel,
    index: int,
    current: Tensors,
    stream: list[Tensor],
    importance: list[Tensor | None],
    sites: Sequence[Site],
    rotations: BlockRotations,
) -> dict[str, Tensor]:
    """{site name: second moments [k, k] of its input}, from one forward pass that ends at the last of the sites."""
    grams = {site.name: Gram(current[f"{site.linears[0]}.weight"].shape[1]) for site in sites}
    for hidden, weight in zip(stream, importance, strict=True):
        found, _ = model.inputs_of(index, current, hidden, sites)
        for site in sites:
            x = found[site.name].flatten(0, -2)
            if site.reads == "hidden" and rotations.mlp_out is not None:
                x = rotate_blocks(x, rotations.mlp_out)
            try:
                grams[site.name].add_tokens(Tokens(x, weight))
            except ValueError as error:
                raise ValueError(f"{model.family.block_prefix(index)}{site.linears[0]}: {error}") from error
    return {name: gram.mean() for name, gram in grams.items()}


def _quantize_site(
    site: Site, weights: Tensors, gram: Tensor | None, recipe: Recipe, rotation: Tensor | None
) -> dict[str, Tensors]:
    """Quantise the linears of a site as one stacked matrix (rows are independent), and cut the result."""
    w = torch.cat([weights[f"{linear}.weight"] for linear in site.linears])
    count = recipe.salient.count_at(site.reads)
    if count and recipe.salient.is_basis(site.reads):
        assert gram is not None
        tensors = quantize_with_basis(w, gram, recipe.quant, count)
    else:
        index = _salient_index(site, gram, recipe, count) if count else None
        tensors = quantize_weight(w, gram, recipe.quant, index)
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
    fmt: LinearFormat,
) -> LinearReport:
    wide, error = w.double(), (w_hat - w).double()
    if gram is None:
        signal, noise = wide.square().sum(), error.square().sum()
    else:
        signal, noise = ((wide @ gram) * wide).sum(), ((error @ gram) * error).sum()
    return LinearReport(
        name=model.family.block_prefix(index) + linear,
        bits=fmt.bits,
        num_salient=fmt.num_salient,
        bits_per_weight=8 * sum(t.nbytes for t in tensors.values()) / w.numel(),
        sqnr_db=float(10 * torch.log10(signal / noise.clamp_min(1e-300))),
        measured_on="weights" if gram is None else "outputs",
    )
