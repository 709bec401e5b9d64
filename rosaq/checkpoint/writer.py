"""Writing: tensors as they come, one shard in memory, final names only when everything is on disk."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rosaq.checkpoint.reader import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 2 * 1024**3


def write_shards(
    directory: str | Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[Path]:
    """Write (name, tensor) pairs as they come; at most one shard of `max_shard_bytes` is held in memory.

    Gives model.safetensors, or model-00001-of-0000N.safetensors with their index, which is written last: until then
    nothing has a final name, so an interrupted run leaves no checkpoint that looks complete. Returns the files.
    OSError (ENOSPC) tells the bytes got and needed when the disk is full.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, need at least 1")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total, pending_bytes, seen = 0, 0, set[str]()
    try:
        for name, tensor in tensors:
            if name in seen:
                raise ValueError(f"tensors: got {name!r} twice, need every name once")
            seen.add(name)
            if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
                shards.append(_write_partial(directory, len(shards), pending))
                pending, pending_bytes = {}, 0
            pending[name] = tensor.detach().cpu().contiguous()
            pending_bytes += tensor.nbytes
            total += tensor.nbytes
        if not seen:
            raise ValueError("tensors: got none, need at least one")
        shards.append(_write_partial(directory, len(shards), pending))
    except BaseException:
        for path in directory.glob("model-*.partial"):
            path.unlink()
        raise
    return _name_shards(directory, shards, total)


def _write_partial(directory: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = directory / f"model-{number + 1:05d}.partial"
    needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(directory).free
    full = f"{directory}: disk full: got {free} bytes free, need {needed} for shard {number + 1}"
    if free < needed:
        raise OSError(errno.ENOSPC, full)
    try:
        # clone() where one storage is named twice (tied weights): the format has no aliases.
        first_name = {t.data_ptr(): name for name, t in reversed(tensors.items())}
        owned = {name: t if first_name[t.data_ptr()] == name else t.clone() for name, t in tensors.items()}
        save_file(owned, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors leaves 0600, unreadable for a server that runs as another user
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, full) from error
        raise
    return path, list(tensors)


def _name_shards(directory: Path, shards: list[tuple[Path, list[str]]], total: int) -> list[Path]:
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX_FILE]:
        stale.unlink(missing_ok=True)
    if len(shards) == 1:
        return [shards[0][0].rename(directory / SINGLE_FILE)]
    weight_map: dict[str, str] = {}
    files = []
    for number, (path, names) in enumerate(shards, 1):
        files.append(path.rename(directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"))
        weight_map |= dict.fromkeys(names, files[-1].name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    partial = directory / (INDEX_FILE + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(directory / INDEX_FILE)
    return files
