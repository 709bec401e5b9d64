"""The dense model as the pipeline reads it: checked before any work, then one block of float32 tensors at a time."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel
from rosaq.checkpoint import WeightReader, model_directory
from rosaq.experts import NAMES, name_on_disk

# Mixtures on disk have a tensor for each linear of each expert, or one for all experts, as in transformers' memory.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_ROWS_AT_ONCE = 4096  # of two vocabularies that are compared: memory never holds both


def local_directory(model: str | Path) -> Path:
    """`model_directory`, which must have a config.json."""
    directory = model_directory(model)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model: got {directory} without config.json, need a Hugging Face model directory")
    return directory


class DenseModel:
    """Weights and code of a dense model. `blocks` runs them, `passes` does for the calibration text (in bfloat16, if so
    wanted and the device has it), `block(i)` reads the weights of one. What is read goes to `device`."""

    def __init__(self, directory: Path, *, bf16: bool = False, device: torch.device | None = None) -> None:
        self.directory = directory
        self.blocks = BlockModel(directory, device)
        self.device = self.blocks.device
        self.passes = self.blocks.in_bf16() if bf16 else self.blocks
        self.reader = WeightReader(directory)
        family = self.blocks.family
        self.embedding_name = f"{family.embedding}.weight"
        self.final_norm_name = f"{family.final_norm}.weight"
        self.head_name = f"{family.head}.weight"
        # transformers believes the weights, not the config, where they hold a head of their own
        self.is_tied = bool(getattr(self.blocks.config, "tie_word_embeddings", False)) and not self._has_own_head()
        if self.is_tied:
            self.head_name = self.embedding_name
        wanted = [self.embedding_name, self.final_norm_name, self.head_name]
        for index in range(self.blocks.sizes.num_blocks):
            wanted += [family.block_prefix(index) + name for name in self.blocks.tensor_names()]
        missing = [name for name in wanted if self._place(name) is None]
        if missing:
            raise ValueError(
                f"model: {directory} lacks {len(missing)} of {len(wanted)} tensors, the first is {missing[0]!r}"
            )
        dtype = self.reader.dtype(self.embedding_name)
        # what is not quantised stays in 16 bits; a float32 source becomes float16
        self.dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16

    def _has_own_head(self) -> bool:
        """True where a head is stored that differs from the embedding stored beside it."""
        names = (self.embedding_name, self.head_name)
        if not all(name in self.reader for name in names):
            return False
        shape, other = map(self.reader.shape, names)
        if shape != other:
            return True
        parts = (slice(start, start + _ROWS_AT_ONCE) for start in range(0, shape[0], _ROWS_AT_ONCE))
        pairs = ([self.reader.get_entry(name, rows).float() for name in names] for rows in parts)
        return not all(torch.equal(*pair) for pair in pairs)

    def get(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor (or `rows` of it, of one that is no expert's) as float32; ValueError naming it if it holds NaN or
        Inf."""
        place = self._place(name)
        if place is None:
            raise ValueError(f"model: got no tensor {name!r}, need it")
        stored = self._read(*place) if rows is None else self.reader.get_entry(place[0], rows)
        tensor = stored.to(self.device).float()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weights: {name}: got NaN or Inf, need finite numbers")
        return tensor

    def get_rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (ascending int64) of a matrix, float32, with a part of it in memory at a time; as `get`
        otherwise."""
        borders = range(0, int(index[-1]) + 1, _ROWS_AT_ONCE)
        parts = index.split(torch.bincount(index // _ROWS_AT_ONCE, minlength=len(borders)).tolist())
        return torch.cat(
            [
                self.get(name, slice(start, start + _ROWS_AT_ONCE))[part - start]
                for start, part in zip(borders, parts, strict=True)
                if len(part)
            ]
        )

    def _place(self, name: str) -> tuple[str, int | None, int | None] | None:
        """(name on disk, expert, which half of its rows) of the tensor that the model calls `name`; None: not there."""
        for on_disk in (name, name_on_disk(name, self.blocks.config.model_type)):
            if on_disk in self.reader:
                return on_disk, None, None
        expert = _EXPERT.match(name)
        if expert is None:
            return None
        path, number, linear = expert[1], int(expert[2]), expert[3]
        _, up, down = NAMES[self.blocks.config.model_type]
        fused = f"{path}.down_proj" if linear == down else f"{path}.gate_up_proj"
        return (fused, number, None if linear == down else int(linear == up)) if fused in self.reader else None

    def _read(self, on_disk: str, expert: int | None, half: int | None) -> Tensor:
        if expert is None:
            return self.reader.get(on_disk)
        tensor = self.reader.get_entry(on_disk, expert)
        return tensor if half is None else tensor.chunk(2)[half]

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` under their names inside it, float32."""
        prefix = self.blocks.family.block_prefix(index)
        return {name: self.get(prefix + name) for name in self.blocks.tensor_names()}

    def to_storage(self, tensor: Tensor, name: str) -> Tensor:
        """A tensor that is not quantised, in 16 bits; ValueError where float16 cannot hold it."""
        stored = tensor.to(self.dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"{name}: got values up to {tensor.abs().max().item():.3g}, which overflow {self.dtype}; "
                "convert the model to bfloat16 first"
            )
        return stored
