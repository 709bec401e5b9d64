"""How weights are rotated, rounded, and what of them stays in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from rosaq.config import LinearFormat

READS = ("residual", "values", "hidden")  # what a site's linears read


def check_choices(spec: Any, *names: str) -> None:
    """ValueError for the first of these fields of a dataclass that is none of the words its type lists."""
    hints = get_type_hints(type(spec))
    for name in names:
        if getattr(spec, name) not in get_args(hints[name]):
            raise ValueError(f"{name}: got {getattr(spec, name)!r}, need one of {', '.join(get_args(hints[name]))}")


@dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix becomes codes.

    method      "rtn" (round to nearest) or "gptq" (error feedback on the second moments of the inputs).
    damping     added to the diagonal of the second moments, as a share of the mean of its non-salient part; below 1e-8
                it counts as that.
    clip        search a smaller range per group for the least weighted squared error (False: use min and max).
    half_zeros  zero points may lie halfway between two codes, so that 8 levels stand evenly around zero. No other
                format has them: such weights cannot be exported as codes.
    refine      rounds of refitting scales and revisiting codes after GPTQ (0: none).
    """

    bits: int = 3
    group_size: int = 64
    symmetric: bool = False
    method: Literal["rtn", "gptq"] = "gptq"
    damping: float = 0.01
    clip: bool = True
    half_zeros: bool = False
    refine: int = 0

    def __post_init__(self) -> None:
        LinearFormat(self.bits, self.group_size, self.symmetric)
        check_choices(self, "method")
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
    sites: tuple[str, ...] = READS
    basis: tuple[str, ...] = ("hidden",)

    def __post_init__(self) -> None:
        check_choices(self, "by")
        for name in ("sites", "basis"):
            unknown = sorted(set(getattr(self, name)) - set(READS))
            if unknown:
                raise ValueError(f"{name}: got {unknown}, need some of what sites read: {', '.join(READS)}")

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
                order of eigenvalue), "pca-random" (salient principal axes first, random basis of the rest),
                "pca-fitted" (the same, and the rest fitted to the weights that few levels are to stand for, with gains
                of the norms that give their columns equal energy). Or online at every site that reads the stream:
                "hadamard" (shared block), where nothing can be folded, or "dense".
    values      per key-value head, folded into v_proj and o_proj: "none", "random", "pca", "fitted" (to o_proj, with a
                scale a channel). Or online: "dense".
    mlp_out     online at down_proj's input: "none", "hadamard" (shared block), "dense".

    "dense" is the site's own principal axes as one [1, k, k] matrix, made with the site's codes: ROSAQ per layer, to
    the letter. It takes more bytes than the codes.

    fit_steps   that "pca-fitted" takes, each over the weights of one block.
    """

    residual: Literal["none", "random", "pca", "pca-random", "pca-fitted", "hadamard", "dense"] = "none"
    values: Literal["none", "random", "pca", "fitted", "dense"] = "none"
    mlp_out: Literal["none", "hadamard", "dense"] = "none"
    fit_steps: int = 480

    def __post_init__(self) -> None:
        check_choices(self, "residual", "values", "mlp_out")
        if self.fit_steps < 1:
            raise ValueError(f"fit_steps: got {self.fit_steps}, need at least 1")

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
        return self.residual in ("random", "pca", "pca-random", "pca-fitted")

    @property
    def is_fitted(self) -> bool:
        """True where any rotation is fitted to the weights."""
        return self.residual == "pca-fitted" or self.values == "fitted"

    def is_dense(self, reads: str) -> bool:
        """True where the sites that read `reads` rotate their input online by their own principal axes."""
        return self._kinds[reads] == "dense"

    @property
    def any_dense(self) -> bool:
        """True where any site does."""
        return "dense" in self._kinds.values()


@dataclass(frozen=True)
class RowSpec:
    """Error feedback between the rows of a weight, by the gradient of the predictions at its outputs (YAQA).

    parts       that the rows of every linear are rounded in, each making up for the errors of those before; 1: rows
                are independent, as in GPTQ.
    sequences   of the calibration text that the gradient is taken on.
    sites       names of the sites whose rows hear of each other; empty for all.
    """

    parts: int = 1
    sequences: int = 16
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("parts", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")

    def is_at(self, site: str) -> bool:
        """True where the rows of the site of this name in the family's table hear of each other."""
        return self.parts > 1 and site in (self.sites or (site,))
