"""Which text and tokens a run listens to, how it shares bits out, and how much it tunes."""

from __future__ import annotations

from dataclasses import dataclass

from rosaq.config import GROUP_SIZES, SUPPORTED_BITS, check_bits

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
    batch_size    sequences per step, shared out between processes; each takes one at least, so with more processes than
                  this a step has more, and there may be fewer steps.
    passes        over the calibration sequences at most: with few of them there are fewer steps.
    codes_rate    learning rate of the codes before rounding, in codes a step.
    scales_rate   of the scales, as a share of themselves; gains_rate: of the norms' gains, likewise.
    salient_rate  of the salient weights, in units of the linear's mean scale.
    model_rates   what the last three are multiplied by in the steps of the whole model.
    """

    steps: int = 0
    model_steps: int = 0
    batch_size: int = 2
    passes: int = 2
    codes_rate: float = 5e-3
    scales_rate: float = 1e-3
    gains_rate: float = 5e-4
    salient_rate: float = 1e-3
    model_rates: float = 2.0

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
        if not self.model_rates > 0:
            raise ValueError(f"model_rates: got {self.model_rates}, need a positive number")


@dataclass(frozen=True)
class BudgetSpec:
    """How bits and 16-bit directions are shared out between the sites of all blocks; with neither a target nor a share
    all sites get `QuantSpec.bits` and `SalientSpec`'s number.

    target_bits   bits per weight of the quantised linears on average, every tensor of theirs counted. Widths and
                  directions go where they take most off the expected loss for their bits.
    energy        directions at a site: the fewest that hold this share of its second moments.
    most          directions at one site at most; 0 for none, under a target.
    widths        of the codes that a target may choose from.
    group_sizes   below `QuantSpec.group_size` that a target may give codes of the largest width, where they divide
                  the channels.
    sequences     of the calibration text that the sites are measured on; more where feedback between rows takes more.
    """

    target_bits: float | None = None
    energy: float | None = None
    most: int = 16
    widths: tuple[int, ...] = SUPPORTED_BITS
    group_sizes: tuple[int, ...] = ()
    sequences: int = 8

    def __post_init__(self) -> None:
        if self.energy is not None and self.target_bits is not None:
            raise ValueError(f"energy: got {self.energy} with target_bits {self.target_bits}, need one of them")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"energy: got {self.energy}, need 0 < energy < 1")
        if self.target_bits is not None and not self.target_bits > 0:
            raise ValueError(f"target_bits: got {self.target_bits}, need a positive number")
        if self.most < (0 if self.energy is None else 1):
            raise ValueError(f"most: got {self.most}, need 1 or more, or 0 without a share of energy")
        if self.sequences < 1:
            raise ValueError(f"sequences: got {self.sequences}, need at least 1")
        if not self.widths:
            raise ValueError(f"widths: got {self.widths}, need some of {SUPPORTED_BITS}")
        for bits in self.widths:
            check_bits(bits)
        if not {*self.group_sizes} <= {*GROUP_SIZES}:
            raise ValueError(f"group_sizes: got {self.group_sizes}, need some of {GROUP_SIZES}")

    @property
    def is_fixed(self) -> bool:
        """True where all sites get the same."""
        return self.target_bits is None and self.energy is None


@dataclass(frozen=True)
class CalibrationSpec:
    """How much text the second moments are measured on, and which windows.

    num_sequences   windows of sequence_length tokens; None: as many as the preset says.
    seed        0 <= seed < 2**31: of the windows, and of all random draws of the run.
    expansion   copies of every sequence, each rolled by another multiple of length / expansion (RSQ's data expansion: a
                token then stands at several positions).
    bf16        matrix products of the passes over the text in bfloat16, where the device has instructions for it
                (what that saves is in DESIGN.md 4). Second moments, rotations, grids and the proof that rotating
                changed nothing stay in float32 and float64.
    """

    num_sequences: int | None = None
    sequence_length: int = 512
    batch_size: int = 8
    seed: int = 0
    expansion: int = 1
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("num_sequences", "sequence_length", "batch_size", "expansion"):
            value = getattr(self, name)
            if value is None and name == "num_sequences":
                continue
            if value < 1:
                raise ValueError(f"{name}: got {value}, need at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: got {self.seed}, need 0 <= seed < 2**31")
