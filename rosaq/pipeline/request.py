"""What a run was asked for: refused where it cannot be met, and written down so that `resume` goes on with the same."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import rosaq
from rosaq.calibrate import BlockModel, num_ranks
from rosaq.config import GROUP_SIZES, LinearFormat
from rosaq.models import Family
from rosaq.pipeline.block import formats
from rosaq.pipeline.budget import SiteChoice, check_in_reach, grids_of, same_everywhere, stored_bits
from rosaq.pipeline.rotations import online_blocks
from rosaq.pipeline.source import DenseModel
from rosaq.rotation import BlockRotations
from rosaq.specs import CalibrationSpec, Recipe
from rosaq.text import builtin_text, read_text, token_windows


def fit_to_family(recipe: Recipe, family: Family) -> Recipe:
    """The recipe as far as `family` can take it; a warning says what was changed, if anything.

    Where a norm stands between the writers and the residual stream, no rotation of the stream folds. What the recipe
    wants of it is then made online, site by site: principal directions as a basis of the site's own, mixing as a
    Hadamard block.
    """
    rotation, salient = recipe.rotation, recipe.salient
    if not family.is_post_normed or not rotation.folds_residual:
        return recipe
    online: Literal["none", "hadamard"] = "none" if rotation.residual == "pca" else "hadamard"
    most = recipe.most_salient_at("residual")
    if most and salient.by == "eigenvalue":
        salient = replace(salient, basis=tuple(dict.fromkeys(("residual", *salient.basis))))
    warnings.warn(
        f"{family.name}: got a recipe that rotates the residual stream ({rotation.residual!r}), which norms behind its "
        f"writers do not let fold: made online, per site, with rotation {online!r} and "
        f"{most if recipe.budget.is_fixed or not most else f'up to {most}'} salient directions of its own",
        UserWarning,
        stacklevel=3,
    )
    return replace(recipe, rotation=replace(rotation, residual=online), salient=salient)


def check_formats(model: BlockModel, recipe: Recipe) -> None:
    """Refuse what the recipe cannot do with this model before any work, naming the linear."""
    quant, stages = recipe.quant, sorted({site.stage for site in model.family.sites})
    for name, sites in {"importance": recipe.importance.sites, "rows": recipe.rows.sites}.items():
        unknown = sorted({*sites} - {*stages})
        if unknown:
            raise ValueError(f"{name}.sites: got {unknown}, need some of {stages} in {model.family.name}")
    for name, (k, n) in model.linear_sizes().items():
        site = next(s for s in model.family.sites if name in s.linears)
        count = recipe.salient.count_at(site.reads)
        LinearFormat(quant.bits, quant.group_size, quant.symmetric, count).check_sizes(k, n, name)
    k, n = model.head_size()
    if recipe.quantizes_head:
        count = recipe.salient.count_at(model.family.head_site.reads)
        LinearFormat(recipe.head_bits, quant.group_size, quant.symmetric, count).check_sizes(k, n, model.family.head)


def check_target(model: BlockModel, recipe: Recipe) -> None:
    """Refuse a target of bits that no choice of widths, directions and groups meets, before any work."""
    budget, sizes = recipe.budget, model.linear_sizes()
    if budget.target_bits is None:
        return
    rotations = BlockRotations(online=online_blocks(model, recipe))

    def average(choices: dict[str, SiteChoice]) -> float:
        fmts = formats(recipe, model, rotations, choices)
        weights = sum(k * n for k, n in sizes.values())
        return sum(stored_bits(fmts[name], *size) for name, size in sizes.items()) / weights

    least, most = {}, {}
    for site in model.family.sites:
        k, _ = sizes[site.linears[0]]
        grids, kept = grids_of(recipe, k), min(recipe.most_salient_at(site.reads), k // 4)
        least[site.name] = SiteChoice(min(budget.widths), 0, recipe.quant.group_size)
        most[site.name] = SiteChoice(max(budget.widths), kept, grids[-1][1])
    check_in_reach(budget.target_bits, average(least), average(most))


def tell_dense_rotations(model: BlockModel, recipe: Recipe) -> None:
    """Warn of what dense online rotations cost, where the recipe makes any."""
    if not recipe.rotation.any_dense:
        return
    sizes = model.linear_sizes()
    fmts = formats(recipe, model, BlockRotations(), same_everywhere(recipe, model.family, 1)[0])
    num_weights = sum(k * n for k, n in sizes.values())
    stored = sum(stored_bits(fmt, *sizes[linear]) for linear, fmt in fmts.items()) / num_weights
    rotations = sum(16 * fmt.rotation_size**2 for fmt in fmts.values()) / num_weights
    warnings.warn(
        f"{recipe.name}: got dense rotations, one for each linear: {rotations:.2f} of {stored:.2f} bits per weight are "
        "theirs (the dense model has 16), and they are read with every token; need a folded rotation or a basis "
        "(recipes rosaq, rosaq-basis) where size or speed counts",
        UserWarning,
        stacklevel=3,
    )


def tell_cpu_only(recipe: Recipe) -> None:
    """Warn of groups that no CUDA kernel takes."""
    size = recipe.quant.group_size
    if size not in (-1, *GROUP_SIZES):
        warnings.warn(
            f"group_size: got {size}, which runs on a CPU only (or densely, by `rosaq convert`); need one of "
            f"{GROUP_SIZES} or -1 (whole rows) for a GPU",
            UserWarning,
            stacklevel=3,
        )


def tell_untied_head(dense: DenseModel, recipe: Recipe) -> None:
    """Warn where codes for the head make the checkpoint larger: it was the embedding, which stays in 16 bits."""
    if recipe.quantizes_head and dense.is_tied and not recipe.rotation.folds_residual:
        k, n = dense.blocks.head_size()
        warnings.warn(
            f"head_bits: got {recipe.head_bits} for a head [{n}, {k}] tied to the embedding, which stays in 16 bits: "
            f"the codes come on top, {n * k * recipe.head_bits / 8e6:.1f} MB of them; need 16 where size counts, or a "
            "recipe that rotates the residual stream, which unties them anyway",
            UserWarning,
            stacklevel=3,
        )


def calibration_windows(
    dense: DenseModel, recipe: Recipe, calibration: str | Path | list[str] | None, spec: CalibrationSpec
) -> Tensor:
    """The windows of the file or documents `calibration` (None: built-in prose), int64 [num_sequences * expansion,
    length]; none for a recipe that neither looks at tokens nor rotates. A warning where they overlap for want of text;
    ValueError where there is less than one window of it, or windows are longer than the model reads."""
    from transformers import AutoTokenizer

    if spec.num_sequences is None:
        raise ValueError("num_sequences: got None, need a number: `rosaq.quantize` takes the preset's")
    if isinstance(calibration, str | Path):
        calibration = read_text(calibration)
    if not recipe.needs_tokens and recipe.rotation.is_identity:
        return torch.empty(0, spec.sequence_length, dtype=torch.int64)
    limit = getattr(dense.blocks.config, "max_position_embeddings", None)
    if limit is not None and spec.sequence_length > limit:
        raise ValueError(
            f"sequence_length: got {spec.sequence_length}, need at most {limit}, the positions this model knows"
        )
    tokenizer = AutoTokenizer.from_pretrained(dense.directory)
    documents = builtin_text("calibration") if calibration is None else calibration
    ids = token_windows(tokenizer, documents, spec.num_sequences, spec.sequence_length, spec.seed)
    if spec.sequence_length > 1 and not (ids != ids[:, :1]).any():
        raise ValueError(f"calibration: got {len(ids)} sequences of one repeated token each, need text")
    num_batches = -(-len(ids) * spec.expansion // spec.batch_size)
    if num_batches < num_ranks():
        raise ValueError(
            f"num_sequences: got {spec.num_sequences} in {num_batches} batches of {spec.batch_size} for {num_ranks()} "
            "processes, need at least one batch each"
        )
    # RSQ's expansion: what an attention sink or an early position hides in one copy is in plain sight in another
    return torch.cat([ids.roll(k * spec.sequence_length // spec.expansion, 1) for k in range(spec.expansion)])


def request_of(dense: DenseModel, recipe: Recipe, spec: CalibrationSpec, input_ids: Tensor) -> dict[str, Any]:
    """Everything that decides the result, for resuming."""
    config = json.loads((dense.directory / "config.json").read_text(encoding="utf-8"))
    return {
        "recipe": asdict(recipe),
        "calibration": asdict(spec),
        "device": dense.device.type,
        "versions": {  # attention and norms are transformers' own code
            "rosaq": rosaq.__version__,
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
        "threads": torch.get_num_threads(),  # sums are in another order with others
        "products": "bfloat16" if dense.passes.is_bf16 else "float32",
        "ranks": num_ranks(),
        "tokens": hashlib.sha256(input_ids.numpy().tobytes()).hexdigest(),
        "model": config,
        "weights": {path.name: _fingerprint(path) for path in sorted(dense.directory.glob("*.safetensors"))},
    }


def _fingerprint(path: Path) -> str:
    """Of a weight file: its size, header and both ends; hashing all of 140 GB would take longer than a block."""
    size, sample = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(sample))
        file.seek(max(0, size - sample))
        digest.update(file.read(sample))
    return f"{size}:{digest.hexdigest()}"
