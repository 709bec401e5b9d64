"""Tables for the terminal, out of plain result dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from rosaq.config import CheckpointConfig, LinearFormat

LAYER_TITLES = {"num_salient": "sal.", "bits_per_weight": "bits/w", "sqnr_db": "SQNR dB", "measured_on": "on"}


def _rows(caption: str | None = None) -> Table:
    """A table whose columns fit into 80 characters: one rule under the header, nothing between."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")


def format_bytes(num_bytes: float) -> str:
    """1234567 -> "1.2 MB" (powers of 1000, as disks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def format_number(value: float | None, spec: str) -> str:
    """`value` under a format spec, "-" for None."""
    return "-" if value is None else format(value, spec)


# The columns that an evaluation and a range of its positions share.
_SCORES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ppl": lambda row: f"{row['ppl']:.2f}",
    "mean KL": lambda row: format_number(row["kl"], ".4f"),
    "KL p99": lambda row: format_number(row["kl_p99"], ".3f"),
    "top-1": lambda row: format_number(row["top1_agreement"], ".1%"),
}


def eval_table(results: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Table:
    """One row per evaluation; `results` are `EvalResult.to_dict()` (optionally with "quantize_seconds").

    A column tells the context where it is not the same for all of them.
    """
    first = results[0]
    text = first["text"] + (f"[{first['documents']}]" if first["documents"] else "")
    contexts = sorted({result["context"] for result in results})
    length = f"{contexts[0]} tokens" if len(contexts) == 1 else "each context"
    caption = f"text {text}, {first['windows']} windows of {length}, no overlap, no BOS, {first['dtype']}"
    references = sorted({result["reference"] for result in results if result["reference"]})
    if references:
        caption += f"\nKL and top-1 against {', '.join(references)}"
    table = _rows(caption)
    table.add_column("model", overflow="fold", min_width=12)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "context": lambda result: str(result["context"]),
        "bits/w": lambda result: format_number(result["bits_per_weight"], ".2f"),
        "size": lambda result: "-" if result["bytes"] is None else format_bytes(result["bytes"]),
        "bits/B": lambda result: f"{result['bits_per_byte']:.3f}",
        **_SCORES,
        "eval s": lambda result: f"{result['seconds']:.1f}",
        "quant s": lambda result: format_number(result.get("quantize_seconds"), ".0f"),
    }
    if len(contexts) == 1:
        del columns["context"]
    if not any("quantize_seconds" in result for result in results):
        del columns["quant s"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for number, result in enumerate(results):
        name = names[number] if names else result["model"]
        table.add_row(name, *(cell(result) for cell in columns.values()))
    return table


def position_table(result: Mapping[str, Any]) -> Table:
    """One row per range of context lengths of one evaluation, `EvalResult.to_dict()`."""
    table = _rows(f"tokens of each window of {result['context']} by the number of tokens before them")
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tokens before": lambda row: f"{row['start']}-{row['stop'] - 1}",
        "predicted": lambda row: str(row["tokens"]),
        **_SCORES,
    }
    return _filled(table, columns, result["by_position"])


def passkey_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """One row per length and depth, and one for each length as a whole; `results` are `PasskeyResult.to_dict()`."""
    table = _rows("retrieved: greedy decoding writes the key; likelier: than random keys, 50 % is chance")
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tokens": lambda row: str(row["length"]),
        "depth": lambda row: format_number(row.get("depth"), ".0%").replace("-", "all"),
        "prompts": lambda row: str(row["prompts"]),
        "retrieved": lambda row: f"{row['retrieved']:.0%}",
        "likelier": lambda row: f"{row['decoys_beaten']:.0%}",
    }
    rows = [{"length": result["length"], **row} for result in results for row in (*result["by_depth"], _whole(result))]
    return _filled(table, columns, rows)


def _whole(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("prompts", "retrieved", "decoys_beaten")}


def tasks_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """One row per task and metric, without the standard errors' own rows; `results` are `TaskResult.to_dict()`."""
    table = _rows()
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "task": lambda row: row["task"],
        "samples": lambda row: str(row["samples"]),
        "metric": lambda row: row["metric"],
        "value": lambda row: f"{row['value']:.4f}",
    }
    rows = [
        {"task": result["task"], "samples": result["samples"], "metric": metric, "value": value}
        for result in results
        for metric, value in result["metrics"].items()
        if "_stderr" not in metric
    ]
    return _filled(table, columns, rows)


def _filled(
    table: Table, columns: Mapping[str, Callable[[Mapping[str, Any]], str]], rows: Iterable[Mapping[str, Any]]
) -> Table:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def describe_format(fmt: LinearFormat) -> str:
    """One line: "int3 g64 asymmetric, 4 salient (index), rotation 1x128"."""
    parts = [f"int{fmt.bits} g{fmt.group_size} {'symmetric' if fmt.symmetric else 'asymmetric'}"]
    if fmt.num_salient:
        parts.append(f"{fmt.num_salient} salient ({fmt.salient})")
    if fmt.rotation_size:
        parts.append(f"rotation {fmt.rotation_blocks}x{fmt.rotation_size}")
    return ", ".join(parts)


_PARTS = {
    "codes": ("qweight",),
    "grids": ("scales", "zeros"),
    "16-bit directions": ("salient_weight", "salient_index", "salient_basis"),
    "rotations": ("rotation",),
}


def describe_bits(bits_by_tensor: Mapping[str, float]) -> str:
    """One line: "3.451: codes 3.000, grids 0.375, 16-bit directions 0.076"; parts that take more than the codes are
    told so."""
    parts = {part: sum(bits_by_tensor.get(name, 0.0) for name in names) for part, names in _PARTS.items()}
    told = [
        f"{part} {bits:.3f}" + (" (MORE THAN THE CODES)" if bits > parts["codes"] else "")
        for part, bits in parts.items()
        if bits
    ]
    return f"{sum(bits_by_tensor.values()):.3f}: {', '.join(told)}"


def config_table(config: CheckpointConfig, bits_by_tensor: Mapping[str, float], total_bytes: int) -> Table:
    """What a checkpoint's `quantization_config` says, and what its files weigh."""
    table = Table(show_header=False)
    table.add_column("key")
    table.add_column("value", overflow="fold")
    table.add_row("recipe", config.recipe or "-")
    table.add_row("format version", str(config.version))
    table.add_row("default", describe_format(config.default))
    for name, fmt in sorted(config.modules.items()):
        table.add_row(name, describe_format(fmt))
    table.add_row("tensor parallel sizes", ", ".join(map(str, config.tp_sizes)) or "not recorded")
    table.add_row("not converted", ", ".join(config.modules_to_not_convert) or "-")
    table.add_row("bits/weight of the blocks", describe_bits(bits_by_tensor))
    table.add_row("all tensors", format_bytes(total_bytes))
    return table


def kinds_table(kinds: Iterable[Mapping[str, Any]]) -> Table:
    """One row per kind of linear: count, shape, bits per weight, bytes, and the mean and worst SQNR where known."""
    table = _rows()
    for column in ("kind", "count", "n x k", "bits/w", "bytes", "SQNR mean", "worst dB"):
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for kind in kinds:
        table.add_row(
            kind["kind"],
            str(kind["count"]),
            kind["shape"],
            f"{kind['bits_per_weight']:.3f}",
            format_bytes(kind["bytes"]),
            format_number(kind["sqnr_mean_db"], ".1f"),
            format_number(kind["sqnr_worst_db"], ".1f"),
        )
    return table


def layers_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    """One row per linear, from the per-layer file of a checkpoint: every key it has is a column."""
    rows = list(layers)
    table = _rows()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        title = LAYER_TITLES.get(column, column)
        table.add_column(title, justify="left" if column == "name" else "right", no_wrap=column == "name")
    for row in rows:
        cells = [row.get(column) for column in columns]
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


def quantize_table(result: Mapping[str, Any]) -> Table:
    """What a run of the pipeline made; `result` is `QuantizeResult.to_dict()`."""
    table = Table(show_header=False)
    table.add_column("key")
    table.add_column("value", overflow="fold")
    table.add_row("output", str(result["output"]))
    table.add_row("recipe", result["recipe"])
    table.add_row("bits/weight of the blocks", describe_bits(result["bits_by_tensor"]))
    table.add_row("all tensors", format_bytes(result["bytes"]))
    if result["head_bits_per_weight"] is not None:
        table.add_row("bits/weight of the head", f"{result['head_bits_per_weight']:.3f}")
    if result["rotation_error"] is not None:
        table.add_row("rotation error of logits", f"{result['rotation_error']:.1e} of the largest")
    worst = min(result["layers"], key=lambda layer: layer["sqnr_db"], default=None)
    if worst is not None:
        table.add_row("worst layer", f"{worst['name']}, SQNR {worst['sqnr_db']:.1f} dB")
    table.add_row("peak memory", format_bytes(result["peak_memory_bytes"]))
    if result["peak_gpu_memory_bytes"] is not None:
        table.add_row(f"peak memory of {result['device']}", format_bytes(result["peak_gpu_memory_bytes"]))
    table.add_row("time", f"{result['seconds']:.0f} s")
    return table


def verify_table(checks: Iterable[Mapping[str, str]]) -> Table:
    """One row per check of `rosaq.verify`: `Check._asdict()`."""
    table = _rows()
    for column in ("check", "", "what was found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check["name"], check["status"], check["detail"])
    return table
