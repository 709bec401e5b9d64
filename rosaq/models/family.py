"""A model family is a table: which linears read which stream, and which norm feeds them.

Nothing here sees a tensor. To add a family, add a table to `rosaq/models/tables.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Reads = Literal["residual", "values", "hidden"]


@dataclass(frozen=True)
class Site:
    """Linears of one block that read the same input; they share rotation, salient set and second moments.

    reads   "residual": the normalised residual stream; "values": concatenated attention heads;
            "hidden": the gated hidden layer of the MLP (a nonlinearity blocks folding).
    norm    the RMSNorm (module path in the block) whose gain folds into these linears, "" for none.
    """

    name: str
    linears: tuple[str, ...]
    reads: Reads
    norm: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture. Paths inside a block are relative to it, the others to the model."""

    name: str
    sites: tuple[Site, ...]  # in order of computation
    writers: tuple[str, ...]  # linears whose output is added to the residual stream
    value: str  # the linear that makes the value heads
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block, in order of computation."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def site_reading(self, reads: Reads) -> Site:
        """The one site that reads "values" or "hidden"."""
        return next(site for site in self.sites if site.reads == reads)

    def block_prefix(self, index: int) -> str:
        """Checkpoint prefix of block `index`, with the trailing dot."""
        return f"{self.blocks}.{index}."


@dataclass(frozen=True)
class Sizes:
    """The numbers a family's tables are applied with, read from the model's config."""

    hidden: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

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
        )
