"""How a checkpoint is made: the choices of a recipe, as plain values. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rosaq.config import SUPPORTED_BITS, LinearFormat, check_bits


@dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix becomes codes.

    method      "rtn" (round to nearest) or "gptq" (error feedback on the second moments of the inputs).
    damping     added to the diagonal of the second moments, as a share of the mean of its non-salient part; below 1e-8
                it counts as that.
    clip        search a smaller range per group for the least weighted squared error (False: use min and max).
    refine      rounds of refitting scales and revisiting codes after GPTQ (0: none).
    """

    bits: int = 3
    group_size: int = 64
    symmetric: bool = False
    method: Literal["rtn", "gptq"] = "gptq"
    damping: float = 0.01
    clip: bool = True
    refine: int = 0

    def __post_init__(self) -> None:
        LinearFormat(self.bits, self.group_size, self.symmetric)
        if self.method not in ("rtn", "gptq"):
            raise ValueError(f"method: got {self.method!r}, need 'rtn' or 'gptq'")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping: got {self.damping}, need 0 <= damping < 1")
        if self.refine < 0 or (self.refine and self.method != "gptq"):
            raise ValueError(f"refine: got {self.refine} with method {self.method!r}, need 0, or more with 'gptq'")


@dataclass(frozen=True)
class SalientSpec:
    """Which directions stay in 16 bits.

    count   directions per site.
    by      "eigenvalue": principal directions of the calibration inputs (ROSAQ; folded PCA channels where the
            rotation makes them, an online basis at the MLP's hidden layer);
            "energy": the input channels with the largest second moment (baseline; no rotation needed).
    sites   which sites keep them, by what they read ("residual", "values", "hidden").
    basis   where they are an online basis, made of the site's own principal directions: sites whose input no rotation
            folds into; the others keep channels. (Only by "eigenvalue".)
    """

    count: int = 0
    by: Literal["eigenvalue", "energy"] = "eigenvalue"
    sites: tuple[str, ...] = ("residual", "values", "hidden")
    basis: tuple[str, ...] = ("hidden",)

    def count_at(self, reads: str) -> int:
        """Directions kept at a site that reads `reads`."""
        return self.count if reads in self.sites else 0

    def is_basis(self, reads: str) -> bool:
        """True where the directions are projections made online."""
        return self.by == "eigenvalue" and reads in self.basis


@dataclass(frozen=True)
class RotationSpec:
    """Which rotations are applied, and where.

    residual    folded into the weights: "none", "random" (randomised Hadamard or Haar), "pca" (principal axes in
                order of eigenvalue), "pca-random" (salient principal axes first, random basis of the rest). Or online
                at every site that reads the stream: "hadamard" (shared block), where nothing can be folded, or "dense".
    values      per key-value head, folded into v_proj and o_proj: "none", "random", "pca". Or online: "dense".
    mlp_out     online at down_proj's input: "none", "hadamard" (shared block), "dense".

    "dense" is the site's own principal axes as one [1, k, k] matrix, made with the site's codes: ROSAQ per layer, to
    the letter. It takes more bytes than the codes.
    """

    residual: Literal["none", "random", "pca", "pca-random", "hadamard", "dense"] = "none"
    values: Literal["none", "random", "pca", "dense"] = "none"
    mlp_out: Literal["none", "hadamard", "dense"] = "none"

    @property
    def _kinds(self) -> dict[str, str]:
        return {"residual": self.residual, "values": self.values, "hidden": self.mlp_out}

    @property
    def is_identity(self) -> bool:
        """True where no weight is changed before its site is quantised."""
        return set(self._kinds.values()) <= {"none", "dense"}

    @property
    def folds_residual(self) -> bool:
        """True where the residual stream itself is rotated, by weights that have the rotation folded in."""
        return self.residual in ("random", "pca", "pca-random")

    def is_dense(self, reads: str) -> bool:
        """True where the sites that read `reads` rotate their input online by their own principal axes."""
        return self._kinds[reads] == "dense"

    @property
    def any_dense(self) -> bool:
        """True where any site does."""
        return "dense" in self._kinds.values()


STRATEGIES = ("uniform", "attention", "norm", "change", "distance", "rarity", "chunks")


@dataclass(frozen=True)
class ImportanceSpec:
    """Which tokens count how much in the second moments (RSQ, section 4). Scores are brought to [floor, 1] per sequence
    and then to a mean of 1.

    strategy    "uniform": all the same;
                "attention": the attention a token gets in the block (attention concentration);
                "norm": length of the token's vector that enters the block (activation norm);
                "change": tokens that the block changes least count most (activation difference);
                "distance": mean squared distance to the tokens of the sequence (token similarity);
                "rarity": tokens that are rare in the calibration text count most (token frequency);
                "chunks": only the parts `chunks` of `num_chunks` equal parts of the sequence; (0,) of 8 is RSQ's
                first-N, (0, 31) of 32 its first-and-last-N.
    floor       what the least important token counts, as a share of the most important one.
    exponent    the importance enters the second moments to this power: 1 as in RSQ's code, 2 as its formula reads.
    quantile    scores above this quantile of their sequence are cut to it. Below 1 it is the sink-aware variant: one
                attention sink no longer sets the range for all other tokens.
    sites       names of the sites whose second moments listen to it; empty for all. Axes that sites share always do.
    """

    strategy: str = "uniform"
    floor: float = 0.01
    exponent: int = 1
    quantile: float = 1.0
    sites: tuple[str, ...] = ()
    chunks: tuple[int, ...] = (0,)
    num_chunks: int = 8

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"importance: got {self.strategy!r}, need one of {', '.join(STRATEGIES)}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor: got {self.floor}, need 0 < floor <= 1")
        if self.exponent not in (1, 2):
            raise ValueError(f"exponent: got {self.exponent}, need 1 or 2")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile: got {self.quantile}, need 0 < quantile <= 1")
        if not self.chunks or not all(0 <= chunk < self.num_chunks for chunk in self.chunks):
            raise ValueError(
                f"chunks: got {self.chunks} of {self.num_chunks}, need some, each at least 0 and below that"
            )

    @property
    def needs_pass(self) -> bool:
        """True where the scores are what the block makes of the tokens, not what enters it."""
        return self.strategy in ("attention", "change")


@dataclass(frozen=True)
class TuneSpec:
    """Tuning: Adam on what a block stores once it is quantised, then on what all blocks store together.

    steps         of Adam per block at most; 0 for no tuning block by block.
    model_steps   of Adam on the whole model at most, with its codes fixed; 0 for none.
    batch_size    sequences per step.
    passes        over the calibration sequences at most: with few of them there are fewer steps.
    codes_rate    learning rate of the codes before rounding, in codes a step.
    scales_rate   of the scales, as a share of themselves; gains_rate: of the norms' gains, likewise.
    salient_rate  of the salient weights, in units of the linear's mean scale.
    """

    steps: int = 0
    model_steps: int = 0
    batch_size: int = 2
    passes: int = 2
    codes_rate: float = 5e-3
    scales_rate: float = 1e-3
    gains_rate: float = 5e-4
    salient_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "model_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, need 0 or more")
        for name in ("batch_size", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")
        for name in ("codes_rate", "scales_rate", "gains_rate", "salient_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, need 0 or more")


@dataclass(frozen=True)
class BudgetSpec:
    """How bits and 16-bit directions are shared out between the sites of all blocks; with neither a target nor a share
    all sites get `QuantSpec.bits` and `SalientSpec`'s number.

    target_bits   bits per weight of the quantised linears on average, every tensor of theirs counted. Widths and
                  directions go where they take most off the expected loss for their bits.
    energy        directions at a site: the fewest that hold this share of its second moments.
    most          directions at one site at most; where the recipe keeps directions, a site keeps at least one.
    widths        of the codes that a target may choose from.
    sequences     of the calibration text that the sites are measured on.
    """

    target_bits: float | None = None
    energy: float | None = None
    most: int = 16
    widths: tuple[int, ...] = SUPPORTED_BITS
    sequences: int = 8

    def __post_init__(self) -> None:
        if self.energy is not None and self.target_bits is not None:
            raise ValueError(f"energy: got {self.energy} with target_bits {self.target_bits}, need one of them")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"energy: got {self.energy}, need 0 < energy < 1")
        if self.target_bits is not None and not self.target_bits > 0:
            raise ValueError(f"target_bits: got {self.target_bits}, need a positive number")
        if self.most < 1 or self.sequences < 1:
            raise ValueError(f"budget: got most {self.most} and sequences {self.sequences}, need at least 1 of each")
        for bits in self.widths:
            check_bits(bits)

    @property
    def is_fixed(self) -> bool:
        """True where all sites get the same."""
        return self.target_bits is None and self.energy is None


@dataclass(frozen=True)
class CalibrationSpec:
    """How much text the second moments are measured on, and which windows.

    seed        0 <= seed < 2**31: of the windows, and of all random draws of the run.
    expansion   copies of every sequence, each rolled by another multiple of length / expansion (RSQ's data expansion: a
                token then stands at several positions).
    bf16        matrix products of the passes over the text in bfloat16, where the device has instructions for it
                (what that saves is in DESIGN.md 4). Second moments, rotations, grids and the proof that rotating
                changed nothing stay in float32 and float64.
    """

    num_sequences: int = 64
    sequence_length: int = 512
    batch_size: int = 8
    seed: int = 0
    expansion: int = 1
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("num_sequences", "sequence_length", "batch_size", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: got {self.seed}, need 0 <= seed < 2**31")


@dataclass(frozen=True)
class RowSpec:
    """Error feedback between the rows of a weight, by the gradient of the predictions at its outputs (YAQA).

    parts       that the rows of every linear are rounded in, each making up for the errors of those before; 1: rows
                are independent, as in GPTQ.
    sequences   of the calibration text that the gradient is taken on.
    """

    parts: int = 1
    sequences: int = 16

    def __post_init__(self) -> None:
        for name in ("parts", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")


HEAD_IN_16_BITS = 16


@dataclass(frozen=True)
class Recipe:
    """A named way from a dense model to a quantised one.

    moments   whose tokens the second moments are measured on: "quantised", of the model whose earlier blocks and sites
              are quantised already (as GPTQ does), or "dense", of the original (one forward pass instead of four).
    rows      error feedback between the rows of the blocks' linears.
    head_bits width of the output head's codes, 3 or 4; 16 leaves it alone. No budget counts it or changes it.
    """

    name: str
    quant: QuantSpec
    rotation: RotationSpec = RotationSpec()
    salient: SalientSpec = SalientSpec()
    importance: ImportanceSpec = ImportanceSpec()
    moments: Literal["quantised", "dense"] = "quantised"
    tune: TuneSpec = TuneSpec()
    budget: BudgetSpec = BudgetSpec()
    rows: RowSpec = RowSpec()
    head_bits: int = HEAD_IN_16_BITS

    def __post_init__(self) -> None:
        if self.head_bits not in (*SUPPORTED_BITS, HEAD_IN_16_BITS):
            raise ValueError(f"head_bits: got {self.head_bits}, need one of {(*SUPPORTED_BITS, HEAD_IN_16_BITS)}")
        if not self.budget.is_fixed and self.moments != "dense":
            raise ValueError(f"budget: got one with moments {self.moments!r}, need 'dense' (recipe rosaq-gptq)")
        if self.tunes and self.moments != "dense":
            raise ValueError(f"tune: got steps with moments {self.moments!r}, need 'dense'")
        if self.rows.parts > 1 and (self.moments != "dense" or self.quant.method != "gptq"):
            raise ValueError(
                f"rows: got {self.rows.parts} parts with moments {self.moments!r} and method {self.quant.method!r}, "
                "need 'dense' and 'gptq'"
            )
        if self.rotation.any_dense and (self.tunes or not self.budget.is_fixed):
            raise ValueError("rotation: got 'dense' with tuning or a budget, need a rotation chosen before the codes")
        both = [r for r in self.salient.sites if self.rotation.is_dense(r) and self.salient.is_basis(r)]
        if self.salient.count and both:
            raise ValueError(f"salient: got a basis and a dense rotation at sites that read {both}, need one of them")

    @property
    def quantizes_head(self) -> bool:
        """True when the output head gets codes."""
        return self.head_bits != HEAD_IN_16_BITS

    @property
    def tunes(self) -> bool:
        """True when anything is tuned after it is quantised."""
        return bool(self.tune.steps or self.tune.model_steps)

    @property
    def has_row_feedback(self) -> bool:
        """True when the rows of a weight hear of each other's errors."""
        return self.rows.parts > 1

    @property
    def has_principal_directions(self) -> bool:
        """True where sites that read the residual stream know principal directions, by a rotation or a basis."""
        return self.rotation.residual in ("pca", "pca-random", "dense") or self.salient.is_basis("residual")

    @property
    def needs_tokens(self) -> bool:
        """True when any step looks at activations (plain round to nearest does not)."""
        looks = self.quant.method == "gptq" or self.salient.count > 0 or self.rotation.any_dense
        return looks or "pca" in self.rotation.residual or self.rotation.values == "pca"
