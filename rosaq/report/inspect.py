"""What is in a checkpoint directory: formats, bits per weight per kind of linear, bytes, per-layer SQNR."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rosaq.checkpoint import WeightReader, read_config, read_json

LAYERS_FILE = "rosaq_layers.json"


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
    modules: dict[str, list[str]] = defaultdict(list)
    for name in reader.names():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            modules[module.rpartition(".")[2]].append(module)
    kinds = []
    for kind, names in modules.items():
        num_bytes, num_weights, shapes = 0, 0, set()
        for module in names:
            fmt = config.format_of(module)
            n, num_words = reader.shape(f"{module}.qweight")
            k = num_words * 32 // fmt.bits
            num_bytes += sum(reader.nbytes(f"{module}.{tensor}") for tensor in fmt.tensor_shapes(k, n))
            num_weights += n * k
            shapes.add(f"{n} x {k}")
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
