"""What is on disk: the tensors of one quantised linear, and `quantization_config` as a whole. Nothing computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 2  # since 2 a zero point may be a multiple of 1/2 (rosaq.layout)
QUANT_METHOD = "rosaq"
SUPPORTED_BITS = (3, 4)
GROUP_SIZES = (128, 64, 32)  # that every kernel takes, as it does whole rows; CPUs take any multiple of 32

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
        """Inverse of `to_dict`; ValueError for a value of another type, and for an unknown key, which may change what
        the tensors mean."""
        values, defaults = dict(values), cls().to_dict()
        unknown = sorted(set(values) - set(defaults))
        if unknown:
            raise ValueError(f"quantization_config: unknown keys {unknown}, need {sorted(defaults)}")
        for key, default in defaults.items():
            if type(values.get(key, default)) is not type(default):
                raise ValueError(f"quantization_config.{key}: got {values[key]!r}, need {type(default).__name__}")
        if "sym" in values:
            values["symmetric"] = values.pop("sym")
        return cls(**values)


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json: the format of every quantised linear of a checkpoint.

    `default` holds for all linears; `modules` overrides it by module-name suffix, the longest matching
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
        suffix = name  # ever shorter: a mixture may list thousands of modules, of which few end alike
        while suffix:
            if suffix in self.modules:
                return self.modules[suffix]
            suffix = suffix.partition(".")[2]
        return self.default

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
        """Read the JSON form; ValueError for another method, a newer version or a value of another type, naming what
        was found."""
        values = dict(values)
        method, version = values.pop("quant_method", None), values.pop("version", None)
        if method != QUANT_METHOD:
            raise ValueError(f"quantization_config.quant_method: got {method!r}, need {QUANT_METHOD!r}")
        if version is None:
            raise ValueError(
                "quantization_config.version: got none, need that of a checkpoint; to round a dense model while it "
                "loads, give quantization_config=RosaqConfig(bits=..., group_size=...)"
            )
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"quantization_config.version: got {version!r}, this rosaq reads 1 to {FORMAT_VERSION}; "
                "a newer checkpoint needs a newer rosaq (pip install -U rosaq)"
            )
        skip, tp_sizes = _list_of(str, values, "modules_to_not_convert"), _list_of(int, values, "tp_sizes")
        modules, recipe = values.pop("modules", {}), values.pop("recipe", "")
        if not isinstance(modules, dict) or not all(isinstance(fmt, dict) for fmt in modules.values()):
            raise ValueError(f"quantization_config.modules: got {modules!r}, need a format for each name")
        if not isinstance(recipe, str):
            raise ValueError(f"quantization_config.recipe: got {recipe!r}, need str")
        default = LinearFormat.from_dict(values)
        formats = {name: LinearFormat.from_dict(default.to_dict() | fmt) for name, fmt in modules.items()}
        return cls(default, formats, skip, recipe, version, tp_sizes)


def _list_of(kind: type, values: dict[str, Any], key: str) -> tuple[Any, ...]:
    """Take `key` out of `values`; empty where it is not there, ValueError where it is no list of `kind`."""
    found = values.pop(key, ())
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, kind) for item in found):
        raise ValueError(f"quantization_config.{key}: got {found!r}, need a list of {kind.__name__}")
    return tuple(found)
