"""Plain values that every part of rosaq agrees on: what one linear stores, and how a recipe makes it.

Nothing here computes. `LinearFormat` and `CheckpointConfig` describe what is on disk (design: "Names and tensors");
`QuantSpec`, `SalientSpec`, `RotationSpec`, `CalibrationSpec` and `Recipe` describe how it is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

FORMAT_VERSION = 1
QUANT_METHOD = "rosaq"
SUPPORTED_BITS = (3, 4)

SalientKind = Literal["index", "basis"]


def check_bits(bits: int) -> None:
    """Raise ValueError unless `bits` is a width that the packed layout exists for."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits: got {bits}, need one of {SUPPORTED_BITS}")


@dataclass(frozen=True)
class LinearFormat:
    """The tensors one quantised linear holds, without its sizes (those are `in_features`, `out_features`).

    bits            3 or 4.
    group_size      in-features that share one scale; -1 means all of them (one group per row).
    symmetric       True: no `zeros` tensor, codes are stored offset by 2**(bits-1).
    num_salient     r, the directions kept in 16 bits; 0 for none.
    salient         "index": directions are channels of t, `salient_index` int32 [r];
                    "basis": directions are columns of `salient_basis` float16 [k, r].
    rotation_blocks B and rotation_size b of `rotation` float16 [B, b, b]; size 0 for no online rotation.
                    B = k / b gives every block its own matrix, B = 1 shares one matrix between all k / b blocks.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    num_salient: int = 0
    salient: SalientKind = "index"
    rotation_blocks: int = 0
    rotation_size: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size != -1 and (self.group_size < 32 or self.group_size % 32):
            raise ValueError(f"group_size: got {self.group_size}, need a positive multiple of 32, or -1 for whole rows")
        if self.num_salient < 0:
            raise ValueError(f"num_salient: got {self.num_salient}, need 0 or more")
        if self.salient not in ("index", "basis"):
            raise ValueError(f"salient: got {self.salient!r}, need 'index' or 'basis'")
        if (self.rotation_blocks == 0) != (self.rotation_size == 0):
            raise ValueError(
                f"rotation: got {self.rotation_blocks} blocks of size {self.rotation_size}, need both zero or neither"
            )

    def groups_of(self, in_features: int) -> int:
        """Number of groups per row, k / group_size."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def group_size_of(self, in_features: int) -> int:
        """The group size as a number of channels (k where `group_size` is -1)."""
        return in_features if self.group_size == -1 else self.group_size

    def check_sizes(self, in_features: int, out_features: int, name: str = "linear") -> None:
        """Raise ValueError, naming `name` and the numbers, if a [out, in] linear cannot take this format."""
        k, n = in_features, out_features
        if k <= 0 or k % 32:
            raise ValueError(f"{name}: in_features: got {k}, need a positive multiple of 32")
        if n <= 0 or n % 8:
            raise ValueError(f"{name}: out_features: got {n}, need a positive multiple of 8")
        if k % self.group_size_of(k):
            raise ValueError(f"{name}: group_size: got {self.group_size}, need a divisor of in_features {k}")
        if self.num_salient > k // 4:
            raise ValueError(f"{name}: salient: got {self.num_salient}, need at most in_features / 4 = {k // 4}")
        if self.rotation_size:
            b, blocks = self.rotation_size, self.rotation_blocks
            if k % b or blocks not in (1, k // b):
                raise ValueError(
                    f"{name}: rotation: got {blocks} blocks of size {b}, "
                    f"need a size that divides in_features {k} and 1 or in_features / size blocks"
                )

    def tensor_shapes(
        self, in_features: int, out_features: int, *, bias: bool = False
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every tensor of one linear as {name: (shape, dtype name)}, in the order of the format description."""
        k, n, groups, r = in_features, out_features, self.groups_of(in_features), self.num_salient
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((n, k * self.bits // 32), "int32"),
            "scales": ((n, groups), "float16"),
        }
        if not self.symmetric:
            shapes["zeros"] = ((n, groups), "uint8")
        if r:
            shapes["salient_weight"] = ((n, r), "float16")
            if self.salient == "index":
                shapes["salient_index"] = ((r,), "int32")
            else:
                shapes["salient_basis"] = ((k, r), "float16")
        if self.rotation_size:
            shapes["rotation"] = ((self.rotation_blocks, self.rotation_size, self.rotation_size), "float16")
        if bias:
            shapes["bias"] = ((n,), "float16")
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, under the names of `quantization_config`."""
        values = asdict(self)
        values["sym"] = values.pop("symmetric")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearFormat:
        """Inverse of `to_dict`; an unknown key is an error (it may change what the tensors mean)."""
        values = dict(values)
        if "sym" in values:
            values["symmetric"] = values.pop("sym")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"quantization_config: unknown keys {unknown}, need {sorted(cls().to_dict())}")
        return cls(**values)


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json: the format of every quantised linear of a checkpoint.

    `default` holds for all linears; `modules` overrides whole formats by module-name suffix, the longest matching
    suffix wins ("mlp.down_proj" covers every layer, "model.layers.0.mlp.down_proj" one).
    `tp_sizes` are the numbers of ranks that tensor parallelism can cut every linear between; empty: not recorded.
    """

    default: LinearFormat
    modules: dict[str, LinearFormat] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    recipe: str = ""
    version: int = FORMAT_VERSION
    tp_sizes: tuple[int, ...] = ()

    def format_of(self, name: str) -> LinearFormat:
        """The format of the linear called `name` (its dotted module path)."""
        matches = [key for key in self.modules if name == key or name.endswith("." + key)]
        return self.modules[max(matches, key=len)] if matches else self.default

    def to_dict(self) -> dict[str, Any]:
        """The JSON form written into config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            **self.default.to_dict(),
            "recipe": self.recipe,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "modules": {name: fmt.to_dict() for name, fmt in sorted(self.modules.items())},
            **({"tp_sizes": list(self.tp_sizes)} if self.tp_sizes else {}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointConfig:
        """Read the JSON form; ValueError for another method or a newer version, naming what was found."""
        values = dict(values)
        method, version = values.pop("quant_method", None), values.pop("version", None)
        if method != QUANT_METHOD:
            raise ValueError(f"quantization_config.quant_method: got {method!r}, need {QUANT_METHOD!r}")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"quantization_config.version: got {version!r}, this rosaq reads 1 to {FORMAT_VERSION}; "
                "a newer checkpoint needs a newer rosaq (pip install -U rosaq)"
            )
        modules = {name: LinearFormat.from_dict(fmt) for name, fmt in values.pop("modules", {}).items()}
        skip = tuple(values.pop("modules_to_not_convert", ()))
        recipe, tp_sizes = values.pop("recipe", ""), tuple(values.pop("tp_sizes", ()))
        return cls(LinearFormat.from_dict(values), modules, skip, recipe, version, tp_sizes)


# --- how a checkpoint is made -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantSpec:
    """How one weight matrix becomes codes.

    method      "rtn" (round to nearest) or "gptq" (error feedback on the second moments of the inputs).
    damping     added to the diagonal of the second moments, as a share of the mean of its non-salient part.
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
    online  directions at the sites of `basis`, where that is another number than `count`.
    """

    count: int = 0
    by: Literal["eigenvalue", "energy"] = "eigenvalue"
    sites: tuple[str, ...] = ("residual", "values", "hidden")
    basis: tuple[str, ...] = ("hidden",)
    online: int | None = None

    def count_at(self, reads: str) -> int:
        """Directions kept at a site that reads `reads`."""
        if reads not in self.sites:
            return 0
        return self.online if self.online is not None and self.is_basis(reads) else self.count

    def is_basis(self, reads: str) -> bool:
        """True where the directions are projections made online."""
        return self.by == "eigenvalue" and reads in self.basis


@dataclass(frozen=True)
class RotationSpec:
    """Which rotations are applied, and where.

    residual    folded into the weights: "none", "random" (randomised Hadamard or Haar), "pca" (principal axes in
                order of eigenvalue), "pca-random" (salient principal axes first, random basis of the rest).
    values      per key-value head, folded into v_proj and o_proj: "none", "random", "pca".
    mlp_out     online at down_proj's input: "none", "hadamard" (shared block).
    """

    residual: Literal["none", "random", "pca", "pca-random"] = "none"
    values: Literal["none", "random", "pca"] = "none"
    mlp_out: Literal["none", "hadamard"] = "none"

    @property
    def is_identity(self) -> bool:
        return self == RotationSpec()


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
    sites       names of the sites whose second moments listen to it; empty for all.
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


@dataclass(frozen=True)
class TuneSpec:
    """Block-wise tuning after quantisation: Adam on what the block stores.

    steps         of Adam per block at most; 0 for no tuning.
    batch_size    sequences per step.
    passes        over the calibration sequences at most: with few of them there are fewer steps.
    codes_rate    learning rate of the codes before rounding, in codes a step.
    scales_rate   of the scales, as a share of themselves; gains_rate: of the norms' gains, likewise.
    salient_rate  of the salient weights, in units of the linear's mean scale.
    bf16          matrix products of the steps in bfloat16 (twice as fast on CPUs that have it).
    """

    steps: int = 0
    batch_size: int = 2
    passes: int = 2
    codes_rate: float = 5e-3
    scales_rate: float = 1e-3
    gains_rate: float = 5e-4
    salient_rate: float = 1e-3
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: got {self.steps}, need 0 or more")
        for name in ("batch_size", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")
        for name in ("codes_rate", "scales_rate", "gains_rate", "salient_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, need 0 or more")


@dataclass(frozen=True)
class CalibrationSpec:
    """How much text the second moments are measured on, and which windows (seed).

    expansion   copies of every sequence, each rolled by another multiple of length / expansion (RSQ's data expansion: a
                token then stands at several positions).
    """

    num_sequences: int = 64
    sequence_length: int = 512
    batch_size: int = 8
    seed: int = 0
    expansion: int = 1

    def __post_init__(self) -> None:
        for name in ("num_sequences", "sequence_length", "batch_size", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")


@dataclass(frozen=True)
class Recipe:
    """A named way from a dense model to a quantised one.

    moments   whose tokens the second moments are measured on: "quantised", of the model whose earlier blocks and sites
              are quantised already (as GPTQ does), or "dense", of the original (one forward pass instead of four).
    """

    name: str
    quant: QuantSpec
    rotation: RotationSpec = RotationSpec()
    salient: SalientSpec = SalientSpec()
    importance: ImportanceSpec = ImportanceSpec()
    moments: Literal["quantised", "dense"] = "quantised"
    tune: TuneSpec = TuneSpec()

    def __post_init__(self) -> None:
        if self.tune.steps and self.moments != "dense":
            raise ValueError(f"tune: got {self.tune.steps} steps with moments {self.moments!r}, need 'dense'")

    @property
    def needs_tokens(self) -> bool:
        """True when any step looks at activations (plain round to nearest does not)."""
        looks = self.quant.method == "gptq" or self.salient.count > 0
        return looks or "pca" in self.rotation.residual or self.rotation.values == "pca"
