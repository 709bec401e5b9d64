"""The recipes and presets by name, and how a request changes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rosaq.config import GROUP_SIZES
from rosaq.specs import BudgetSpec, ImportanceSpec, QuantSpec, Recipe, RotationSpec, RowSpec, SalientSpec, TuneSpec

_RTN = QuantSpec(method="rtn", clip=False)
_GPTQ = QuantSpec(method="gptq", clip=True)

RECIPES: dict[str, Recipe] = {
    # the floor: no calibration, no rotation
    "rtn": Recipe("rtn", _RTN),
    # Frantar et al. 2023, with the clip search; `salient` adds FP16 channels picked by energy
    "gptq": Recipe("gptq", _GPTQ, salient=SalientSpec(0, by="energy")),
    # QuaRot's weight-only form: random rotations everywhere, GPTQ, nothing in 16 bits
    "quarot": Recipe("quarot", _GPTQ, RotationSpec("random", "random", "hadamard")),
    # the ROSAQ paper: principal axes, the K largest eigenvalues in FP16, the rest rounded to nearest
    "rosaq": Recipe("rosaq", _RTN, RotationSpec("pca", "pca"), SalientSpec(16)),
    # the same per layer: every site keeps its own K directions as an online projection, and nothing is rotated
    "rosaq-basis": Recipe("rosaq-basis", _RTN, salient=SalientSpec(16, basis=("residual", "values", "hidden"))),
    # per layer to the letter: every site rotates its input by its own dense PCA matrix, larger than its codes
    "rosaq-layer": Recipe("rosaq-layer", _RTN, RotationSpec("dense", "dense", "dense"), SalientSpec(16, basis=())),
    # ours: a basis fitted to the weights, second moments that listen to attended tokens, GPTQ with, in attention, rows
    # that make up for each other's errors, scales and codes once more, tuning block by block and as a whole. What the
    # scales of groups would take goes into the fourth bit of those codes that gain most by it; no principal directions
    # in 16 bits, which in that basis gain less than the codes that their bits pay for (`salient` has them kept)
    "rosaq-gptq": Recipe(
        "rosaq-gptq",
        replace(_GPTQ, group_size=-1, half_zeros=True, refine=3),
        RotationSpec("pca-fitted", "fitted", "hadamard"),
        SalientSpec(0, sites=("residual",)),
        ImportanceSpec("attention", 0.01),
        moments="dense",
        tune=TuneSpec(steps=64, model_steps=32),
        budget=BudgetSpec(target_bits=3.45, most=0),
        rows=RowSpec(parts=8, sites=("attn_in", "attn_out")),
    ),
}
_UNIFORM_GROUP = 64  # of a recipe with a target, where all codes are to have the same width instead
DEFAULT_RECIPE = "rosaq-gptq"


@dataclass(frozen=True)
class Preset:
    """How much work a run puts into any recipe: calibration windows; the steps of tuning block by block, of the whole
    model and of fitting rotations, as multiples of the recipe's; and whether rows hear of each other's errors, where
    the recipe says how (docs/accuracy.md has what they buy and cost)."""

    num_sequences: int
    steps: int
    model_steps: int
    fit_steps: float
    has_rows: bool


PRESETS = {
    "fast": Preset(32, 0, 0, 0.25, has_rows=False),
    "default": Preset(128, 1, 1, 1, has_rows=True),
    "best": Preset(512, 4, 4, 2.5, has_rows=True),
}
DEFAULT_PRESET = "default"


def preset_of(name: str) -> Preset:
    """The preset `name`; ValueError naming them all for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, need one of {', '.join(PRESETS)}")
    return PRESETS[name]


def make_recipe(
    base: str | Recipe = DEFAULT_RECIPE,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    salient: int | None = None,
    importance: str | None = None,
    target_bits: float | None = None,
    salient_energy: float | None = None,
    head_bits: int | None = None,
    preset: str = DEFAULT_PRESET,
) -> Recipe:
    """The recipe `base` (a name or a recipe of your own) with some of its choices changed; None keeps one.

    A recipe by name that has a target (rosaq-gptq: 3.45 bits per weight) gives every site the same instead once bits,
    group_size or salient is said: 3 bits in groups of 64, but for what is said. From a target of 4 bits on, codes of 4
    bits may stand in smaller groups. A recipe of your own keeps its budget: group_size is then that of all codes.
    ValueError for an unknown name or number, for bits or salient with a budget that chooses them, for a budget without
    dense moments, and for an importance that no second moments would listen to.
    """
    if isinstance(base, str) and base not in RECIPES:
        raise ValueError(f"recipe: got {base!r}, need one of {', '.join(RECIPES)}")
    recipe = RECIPES[base] if isinstance(base, str) else base
    for name, share in {"target_bits": target_bits, "salient_energy": salient_energy}.items():
        if share is not None and recipe.moments != "dense":
            raise ValueError(
                f"{name}: got {share} with recipe {recipe.name!r}, whose moments are {recipe.moments!r}, need 'dense' "
                f"(recipe {DEFAULT_RECIPE})"
            )
    if target_bits is not None or salient_energy is not None:
        most = recipe.budget.most if salient_energy is None else recipe.budget.most or BudgetSpec.most
        budget = replace(recipe.budget, target_bits=target_bits, energy=salient_energy, most=most)
    elif isinstance(base, str) and any(said is not None for said in (bits, group_size, salient)):
        budget = replace(recipe.budget, target_bits=None)
    else:
        budget = recipe.budget
    target = budget.target_bits
    if isinstance(base, str) and group_size is None and target is not None and target >= max(budget.widths):
        budget = replace(budget, group_sizes=GROUP_SIZES)  # what fourth bits leave of it
    chosen_by_budget = {"salient": not budget.is_fixed, "bits": budget.target_bits is not None}
    for name, value in {"salient": salient, "bits": bits}.items():
        if value is not None and chosen_by_budget[name]:
            raise ValueError(f"{name}: got {value} with a budget, which chooses it, need one of them")
    loses_target = recipe.budget.target_bits is not None and budget.target_bits is None
    if group_size is None and isinstance(base, str) and loses_target:
        group_size = _UNIFORM_GROUP
    wanted: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    quant = replace(recipe.quant, **{name: value for name, value in wanted.items() if value is not None})
    chosen = recipe.salient
    if salient is not None:
        if salient < 0:
            raise ValueError(f"salient: got {salient}, need 0 or more")
        if salient and chosen.by == "eigenvalue" and not recipe.has_principal("residual"):
            chosen = replace(chosen, by="energy")  # without principal axes the largest channels are what there is
        chosen = replace(chosen, count=salient)
    listened = recipe.importance if importance is None else replace(recipe.importance, strategy=importance)
    times, steps = preset_of(preset), recipe.tune
    tune = replace(steps, steps=steps.steps * times.steps, model_steps=steps.model_steps * times.model_steps)
    rows = recipe.rows if times.has_rows else replace(recipe.rows, parts=1)
    rotation = recipe.rotation
    if rotation.is_fitted:
        rotation = replace(rotation, fit_steps=max(1, round(rotation.fit_steps * times.fit_steps)))
    changed = replace(
        recipe, quant=quant, rotation=rotation, salient=chosen, importance=listened, tune=tune, budget=budget, rows=rows
    )
    if importance is not None and not changed.needs_tokens:
        raise ValueError(f"importance: got {importance!r} with recipe {recipe.name!r}, need one that looks at tokens")
    return changed if head_bits is None else replace(changed, head_bits=head_bits)
