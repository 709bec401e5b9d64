"""A model family is a table: which linears read which stream, and which norm feeds them.

Nothing here sees a tensor. To add a family, add a table to `rosaq/models/tables.py` (docs/new_family.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

Reads = Literal["residual", "values", "hidden"]
_NUMBER_OF_AN_EXPERT = re.compile(r"^.*experts\.\d+\.")


@dataclass(frozen=True)
class Site:
    """Linears of one block that read the same input; they share rotation, salient set and second moments.

    linears  module paths in the block. A path with "*" stands for one linear in each expert of a mixture: the table's
             site then is a site of its own for every expert, which sees the tokens that are routed to it.
    reads    "residual": the normalised residual stream; "values": concatenated attention heads;
             "hidden": the gated hidden layer of the MLP (a nonlinearity blocks folding).
    norm     the RMSNorm (module path in the block) whose gain folds into these linears, "" for none.
    kept     modules with a weight [out, in] that read the same input and stay in 16 bits: the router of a mixture.
    expert   the expert this site belongs to; None in tables and outside mixtures.
    """

    name: str
    linears: tuple[str, ...]
    reads: Reads
    norm: str = ""
    kept: tuple[str, ...] = ()
    expert: int | None = None

    @property
    def stage(self) -> str:
        """The table's name of the site: its experts' sites are one stage of the block."""
        return self.name.partition(".")[0]

    @property
    def is_per_expert(self) -> bool:
        """True for a table's site that stands for one in every expert."""
        return any("*" in linear for linear in self.linears)

    def of_expert(self, expert: int) -> Site:
        """The site of one expert; what is kept goes with the first, so that it is folded and rotated once."""
        linears = tuple(linear.replace("*", str(expert)) for linear in self.linears)
        kept = () if expert else self.kept
        return replace(self, name=f"{self.name}.{expert}", linears=linears, kept=kept, expert=expert)


@dataclass(frozen=True)
class Family:
    """One architecture. Paths inside a block are relative to it, the others to the model.

    gain_offset      norms multiply by gain_offset + weight: 1 for the Gemma families.
    is_post_normed   True where a norm stands between the writers and the residual stream. Its gain acts on single
                     channels, so no rotation of the stream can be folded through it.
    """

    name: str
    sites: tuple[Site, ...]  # in order of computation, those of a mixture's experts last
    writers: tuple[str, ...]  # linears whose output is added to the residual stream
    value: str  # the linear that makes the value heads
    gain_offset: float = 0.0
    is_post_normed: bool = False
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block, in order of computation."""
        return tuple(linear for site in self.sites for linear in site.linears)

    @property
    def head_site(self) -> Site:
        """The output head as a site of its own; it is in no block."""
        return Site("head", (self.head,), reads="residual", norm=self.final_norm)

    @property
    def gains(self) -> tuple[str, ...]:
        """The weights of the norms that feed the linears of a block, by name."""
        return tuple(sorted({f"{site.norm}.weight" for site in self.sites if site.norm}))

    def sites_reading(self, reads: Reads) -> tuple[Site, ...]:
        """The sites that read `reads`."""
        return tuple(site for site in self.sites if site.reads == reads)

    def with_experts(self, count: int) -> Family:
        """The table of a model with `count` experts in every block: "*" is written out. Unchanged without any "*"."""
        alone = tuple(site for site in self.sites if not site.is_per_expert)
        mixture = [site for site in self.sites if site.is_per_expert]
        sites = alone + tuple(site.of_expert(expert) for site in mixture for expert in range(count))
        writers = tuple(
            writer.replace("*", str(expert))
            for writer in self.writers
            for expert in range(count if "*" in writer else 1)
        )
        return replace(self, sites=sites, writers=writers)

    def block_prefix(self, index: int) -> str:
        """Checkpoint prefix of block `index`, with the trailing dot."""
        return f"{self.blocks}.{index}."


def config_key(linear: str) -> str:
    """The suffix under which config.json keeps the format of `linear`: experts share theirs, so it names none."""
    return _NUMBER_OF_AN_EXPERT.sub("", linear)


@dataclass(frozen=True)
class Sizes:
    """The numbers a family's tables are applied with, from the model's config. num_experts: 0 without a mixture."""

    hidden: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 0

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Read a transformers text config."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            num_blocks=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            num_experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0,
        )
