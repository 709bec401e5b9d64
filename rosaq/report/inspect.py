"""What is in a checkpoint directory: formats, bits per weight per kind of linear, bytes, per-layer SQNR."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rosaq.checkpoint import LAYERS_FILE, WeightReader, linear_bytes, linear_sizes, read_config, read_json


def read_layers(directory: str | Path) -> list[dict[str, Any]]:
    """The per-linear measurements that the pipeline left beside the model; empty where there are none."""
    path = Path(directory) / LAYERS_FILE
    if not path.is_file():
        return []
    layers = read_json(path).get("layers")
    if not isinstance(layers, list):
        raise ValueError(f"{path}: got {type(layers).__name__} under 'layers', need a list")
    return layers


def linears_by_kind(directory: str | Path) -> list[dict[str, Any]]:
    """One dict per kind of linear ("q_proj", "down_proj", ...): count, shape, bits per weight, bytes, SQNR in dB."""
    config, reader = read_config(directory), WeightReader(directory)
    sqnr = {layer["name"]: layer["sqnr_db"] for layer in read_layers(directory)}
    sizes = linear_sizes(config, reader)
    modules: dict[str, list[str]] = defaultdict(list)
    for module in sizes:
        modules[module.rpartition(".")[2]].append(module)
    kinds = []
    for kind, names in modules.items():
        num_bytes = sum(linear_bytes(reader, config, name, sizes[name]) for name in names)
        num_weights = sum(n * k for n, k in map(sizes.__getitem__, names))
        shapes = {f"{n} x {k}" for n, k in map(sizes.__getitem__, names)}
        decibels = [sqnr[name] for name in names if sqnr.get(name) is not None]
        kinds.append(
            {
                "kind": kind,
                "count": len(names),
                "shape": ", ".join(sorted(shapes)),
                "bits_per_weight": 8 * num_bytes / num_weights,
                "bytes": num_bytes,
                "sqnr_mean_db": sum(decibels) / len(decibels) if decibels else None,
                "sqnr_worst_db": min(decibels, default=None),
            }
        )
    return kinds
