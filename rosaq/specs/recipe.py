"""A recipe: all choices together, and which of them exclude each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rosaq.config import SUPPORTED_BITS
from rosaq.specs.weights import QuantSpec, RotationSpec, RowSpec, SalientSpec, check_choices
from rosaq.specs.work import BudgetSpec, ImportanceSpec, TuneSpec

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
        check_choices(self, "moments")
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
        if self.rotation.any_dense and (self.tunes or not self.budget.is_fixed or self.has_row_feedback):
            raise ValueError(
                "rotation: got 'dense' with tuning, a budget or parts of rows, need a rotation chosen before the codes"
            )
        both = [r for r in self.salient.sites if self.rotation.is_dense(r) and self.salient.is_basis(r)]
        if self.salient.count and both:
            raise ValueError(f"salient: got a basis and a dense rotation at sites that read {both}, need one of them")
        kept = [reads for reads in self.salient.sites if self.most_salient_at(reads)]
        unknown = [reads for reads in kept if self.salient.by == "eigenvalue" and not self.has_principal(reads)]
        if unknown:
            raise ValueError(
                f"salient: got principal directions at sites that read {unknown}, which nothing makes there, need "
                "rotation 'pca', a basis, other sites, or channels by 'energy'"
            )

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

    def most_salient_at(self, reads: str) -> int:
        """Directions that a site that reads `reads` has, or may have where a budget chooses."""
        if self.budget.is_fixed:
            return self.salient.count_at(reads)
        return self.budget.most if reads in self.salient.sites else 0

    def has_principal(self, reads: str) -> bool:
        """True where sites that read `reads` know principal directions, by a rotation or a basis."""
        folded = {"residual": "pca" in self.rotation.residual, "values": self.rotation.values == "pca"}
        return folded.get(reads, False) or self.rotation.is_dense(reads) or reads in self.salient.basis

    @property
    def needs_tokens(self) -> bool:
        """True when any step looks at activations (plain round to nearest does not)."""
        looks = self.quant.method == "gptq" or self.salient.count > 0 or self.rotation.any_dense
        looks = looks or self.moments == "dense" or not self.budget.is_fixed
        return looks or "pca" in self.rotation.residual or self.rotation.values == "pca"
