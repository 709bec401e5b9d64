"""Reading: headers first, checked against the files' sizes; tensors when they are asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
DTYPE_OF_TAG = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file if it is not UTF-8 JSON or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: got {error}, need UTF-8 JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, need an object")
    return values


def weights_file(directory: Path) -> Path:
    """The file in `directory` through which its weights are found: the single one, or the index of the shards.

    FileNotFoundError where it has neither.
    """
    # In the order of transformers, so that both read the same model: saving again may leave the index of old shards.
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
    got = f"only pickled weights ({', '.join(pickles)}), which rosaq never opens" if pickles else "no weights"
    raise FileNotFoundError(
        f"{directory}: got {got}, need {SINGLE_FILE} or {INDEX_FILE}, which save_pretrained of transformers writes"
    )


class WeightReader:
    """Lazy access to every tensor of a model directory, by name, through the single file or the shard index.

    Opening it reads the headers only, and refuses: no safetensors weights, a shard that is missing, truncated or
    outside the directory, and an index that names a tensor its shard does not have.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory}: got no such directory, need a model directory")
        self._files: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        path = weights_file(self.directory)
        if path.name == INDEX_FILE:
            self._open_index(path)
        else:
            self._add_file(path)

    def _open_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: got no weight_map, need {{tensor name: file name}}")
        for file_name in sorted(set(weight_map.values())):
            # A checkpoint is often a download: a name with a path in it could read any file of the machine.
            if Path(file_name).name != file_name or file_name in ("", ".", ".."):
                raise ValueError(f"{index}: got file {file_name!r}, need a plain file name inside {self.directory}")
            path = self.directory / file_name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: got no such file, needed by {index.name}")
            self._add_file(path)
        for name, file_name in weight_map.items():
            if name not in self._files or self._files[name].name != file_name:
                raise ValueError(f"{self.directory / file_name}: got no tensor {name!r}, needed by {index.name}")

    def _add_file(self, path: Path) -> None:
        for name, entry in read_header(path).items():
            if name in self._files:
                raise ValueError(f"{path}: got tensor {name!r} that {self._files[name].name} has too, need one of them")
            self._files[name], self._entries[name] = path, entry

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`, without reading it."""
        return DTYPE_OF_TAG[self._entry(name)["dtype"]]

    def nbytes(self, name: str) -> int:
        """The bytes tensor `name` takes on disk."""
        start, stop = self._entry(name)["data_offsets"]
        return int(stop - start)

    def get(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, in the dtype on disk; KeyError naming it if the checkpoint has none."""
        return self._read(name, None)

    def get_entry(self, name: str, index: int | slice) -> Tensor:
        """`get(name)[index]`; no more than that is read."""
        return self._read(name, index)

    def _read(self, name: str, index: int | slice | None) -> Tensor:
        self._entry(name)
        path = self._files[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: got {error} reading {name!r}, need the file that was opened") from error
        return tensor

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise KeyError(f"{self.directory}: got no tensor {name!r} among {len(self._entries)}")
        return self._entries[name]


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor name: {dtype, shape, data_offsets}} of a safetensors file, checked against the file's size.

    ValueError names the file and the bytes got and needed when it is cut short or not safetensors at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path}: got {size} bytes, need {8 + length} for the safetensors header (truncated?)")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        for name, entry in entries.items():
            _check_entry(path, name, entry)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: got a damaged header ({error!r}), need safetensors") from error
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        raise ValueError(f"{path}: got {size} bytes, need {needed} by its header (truncated or damaged)")
    return dict(entries)


def _check_entry(path: Path, name: str, entry: dict[str, Any]) -> None:
    dtype = DTYPE_OF_TAG.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{path}: {name}: got dtype {entry['dtype']}, need one of {', '.join(DTYPE_OF_TAG)}")
    start, stop = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * dtype.itemsize
    if stop - start != needed:
        raise ValueError(f"{path}: {name}: got {stop - start} bytes, need {needed} for shape {entry['shape']}")
