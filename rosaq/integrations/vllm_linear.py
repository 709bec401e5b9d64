"""The parts of a linear layer that an engine has fused, cut for one rank, as the fewest launches; imports no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from rosaq.checkpoint import is_in_block
from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.linear import RosaqLinear
from rosaq.sharding import Piece, check_cut, cut_dim, shard_format, take_salient
from rosaq.soundness import check_index

# What the parts of one launch must have in common: they act on x before any row of W does.
SHARED = ("salient_index", "salient_basis", "rotation")
ROWS = ("qweight", "scales", "zeros", "salient_weight")
_SHARD_IDS = {"q": 0, "k": 1, "v": 2}


def head_refusal(name: str) -> NotImplementedError:
    """What to say of a quantised output head `name`: engines have layers of their own there, which know no codes."""
    return NotImplementedError(
        f"{name}: got a quantised output head, need one in 16 bits for vLLM: quantise with --head-bits 16, run this "
        "checkpoint with transformers, or `rosaq convert DIR -o OUT --to dense`"
    )


def check_head(modules: Iterable[str]) -> None:
    """Raise `head_refusal` if the output head is among the quantised `modules`."""
    for name in modules:
        if not is_in_block(name):
            raise head_refusal(name)


@dataclass
class Part:
    """One linear of the checkpoint: `name` there, its format, the out_features of it that this rank holds."""

    name: str
    format: LinearFormat
    held_out_features: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


def parts_of(checkpoint: CheckpointConfig, prefix: str, names: list[str], held_sizes: list[int]) -> list[Part]:
    """The parts of an engine's layer `prefix`, of which a rank holds `held_sizes` rows each. names: the checkpoint's
    modules for them; or a single one that holds the rows of all (Phi-3's qkv_proj), and still is cut part by part."""
    if len(names) == 1:
        names = [prefix] * len(held_sizes)
    if len(names) != len(held_sizes):
        raise ValueError(f"{prefix}: got {len(held_sizes)} parts, need those of {names}")
    return [Part(name, checkpoint.format_of(name), size) for name, size in zip(names, held_sizes, strict=True)]


class FusedLinear(nn.Module):
    """y [.., sum of the parts' out_features] of x [.., in_features], one launch where the parts allow it.

    in_features         of the checkpoint's tensors; held_in_features of them are this rank's.
    rank, num_ranks     which part of `num_ranks` equal ones of the rows or the columns.
    allowed             the numbers of ranks that the checkpoint says it can be cut between (empty: it does not say).
    """

    def __init__(
        self,
        parts: list[Part],
        *,
        in_features: int,
        held_in_features: int,
        rank: int,
        num_ranks: int,
        allowed: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.parts, self.in_features, self.held_in_features = parts, in_features, held_in_features
        self.rank, self.num_ranks = rank, num_ranks
        self.launches = nn.ModuleList()
        if allowed and num_ranks not in allowed:
            raise ValueError(f"{parts[0].name}: tensor parallel size: got {num_ranks}, need one of {list(allowed)}")
        for part in parts:
            if held_in_features != in_features:
                check_cut(part.format, in_features, part.held_out_features, "in", num_ranks, name=part.name)
            part.format.check_sizes(in_features, part.held_out_features, f"{part.name} (rank {rank} of {num_ranks})")

    # --- loading ----------------------------------------------------------------------------------------------------

    def load(self, key: str, tensor: Tensor, shard_id: Any, device: torch.device) -> None:
        """Take this rank's share of the checkpoint's tensor `key` of one part, or of all where `shard_id` is None."""
        if shard_id is None and len(self.parts) > 1:
            self._load_fused(key, tensor, device)
            return
        number = 0 if shard_id is None else _SHARD_IDS.get(shard_id, shard_id)
        if not isinstance(number, int) or not 0 <= number < len(self.parts):
            raise ValueError(f"{self.parts[0].name}.{key}: got part {shard_id!r}, need one of {len(self.parts)}")
        self._load_part(self.parts[number], key, tensor, device)

    def _load_fused(self, key: str, tensor: Tensor, device: torch.device) -> None:
        """A checkpoint whose linear is fused on disk already: its rows are those of the parts, one after the other."""
        if key in SHARED:
            pieces = [tensor] * len(self.parts)
        else:
            held = [part.held_out_features for part in self.parts]
            times, left = divmod(tensor.shape[0], sum(held))
            if left or times not in (1, self.num_ranks):  # ranks that share key-value heads: whose rows are whose?
                raise ValueError(
                    f"{self.parts[0].name}.{key}: got {tensor.shape[0]} rows, need {sum(held)} for each of "
                    f"{self.num_ranks} ranks: fewer ranks, or a checkpoint with a linear for each part"
                )
            pieces = list(tensor.split([times * rows for rows in held]))
        for part, piece in zip(self.parts, pieces, strict=True):
            self._load_part(part, key, piece, device)

    def _load_part(self, part: Part, key: str, tensor: Tensor, device: torch.device) -> None:
        if key not in part.format.tensor_shapes(self.in_features, part.held_out_features):
            raise ValueError(f"{part.name}.{key}: got {list(tensor.shape)}, need no such tensor by config.json")
        if key == "salient_index":
            check_index(tensor, self.in_features, part.name)
        name, of_rows = f"{part.name}.{key}", self.num_ranks
        if self.held_in_features != self.in_features:
            num_pieces, of_rows = self.in_features // self.held_in_features, 1  # each rank holds all rows
            tensor = self._cut(name, tensor, cut_dim(key, part.format, "in"), num_pieces, self.num_ranks)
        dim = cut_dim(key, part.format, "out")
        if dim is not None:
            if tensor.shape[dim] % part.held_out_features:
                raise ValueError(f"{name}: got {tensor.shape[dim]} rows, need a multiple of {part.held_out_features}")
            tensor = self._cut(name, tensor, dim, tensor.shape[dim] // part.held_out_features, of_rows)
        part.tensors[key] = tensor.to(device, copy=True)

    def _cut(self, name: str, tensor: Tensor, dim: int | None, num_pieces: int, num_ranks: int) -> Tensor:
        """This rank's one of `num_pieces` equal pieces; ValueError where `num_ranks` would not hold all of them."""
        if dim is None or num_pieces == 1:
            return tensor
        size, what = tensor.shape[dim], "columns" if dim else "rows"
        if size % num_pieces:
            raise ValueError(f"{name}: got {size} {what}, need a multiple of {num_pieces}, one piece a rank")
        if num_ranks % num_pieces:
            raise ValueError(
                f"{name}: got {size} {what}, need {size // num_pieces} for each of {num_ranks} ranks, "
                "or for as many of them as do not share theirs"
            )
        # Fewer pieces than ranks: several ranks hold the same key-value heads.
        return tensor.chunk(num_pieces, dim)[self.rank * num_pieces // num_ranks]

    # --- after loading ----------------------------------------------------------------------------------------------

    def pack(self) -> None:
        """Join the parts into launches, checked and packed; nothing where that is done. ValueError names the tensor."""
        if self.launches:
            return
        for group in self._groups():
            first, tensors = group[0], dict(group[0].tensors)
            if len(group) > 1:
                tensors |= {key: torch.cat([part.tensors[key] for part in group]) for key in ROWS if key in tensors}
            self.launches.append(RosaqLinear.from_tensors(tensors, first.format, name=first.name))
        self.parts = []

    def _groups(self) -> list[list[Part]]:
        groups: list[list[Part]] = []
        for part in self.parts:
            self._finish(part)
            if groups and _is_one_launch(groups[-1][0], part):
                groups[-1].append(part)
            else:
                groups.append([part])
        return groups

    def _finish(self, part: Part) -> None:
        """Make `part.format` that of the tensors which are here; ValueError if one is missing."""
        for key in part.format.tensor_shapes(self.in_features, part.held_out_features):
            if key not in part.tensors:
                raise ValueError(f"{part.name}.{key}: got no such tensor in the checkpoint, need it")
        width = self.held_in_features
        if width != self.in_features:
            part.format = shard_format(part.format, Piece("in", self.rank, self.num_ranks))
            part.format = take_salient(part.tensors, part.format, self.rank * width, (self.rank + 1) * width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [.., held in_features] -> y [.., sum of the parts' held out_features], of x's dtype."""
        if len(self.launches) == 1:
            return cast(RosaqLinear, self.launches[0]).compute(x, bias)
        launches = cast(list[RosaqLinear], self.launches)
        sizes = [launch.out_features for launch in launches]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return torch.cat([launch.compute(x, b) for launch, b in zip(launches, biases, strict=True)], dim=-1)


def _is_one_launch(one: Part, other: Part) -> bool:
    """True where both have one format and act on x in the same way."""
    return one.format == other.format and all(
        torch.equal(one.tensors[key], other.tensors[key]) for key in SHARED if key in one.tensors
    )
