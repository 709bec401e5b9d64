"""Put the finished blocks together into a checkpoint that transformers, vLLM and people can read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rosaq.checkpoint import LAYERS_FILE, copy_companions, write_hashes, write_shards
from rosaq.config import CheckpointConfig, LinearFormat
from rosaq.models import Family, config_key
from rosaq.pipeline.head import HEAD_STEP, final_gain, head_rows
from rosaq.pipeline.plan import Plan
from rosaq.pipeline.site import LinearReport
from rosaq.pipeline.source import DenseModel
from rosaq.pipeline.whole_model import finished_block
from rosaq.pipeline.workspace import Workspace
from rosaq.rotation import rotate_rows
from rosaq.sharding import Cut, allowed_sizes


@dataclass(frozen=True)
class Report:
    """What a run measured: one entry per linear; one per block ("tuned": loss before and after, "importance": summary
    of the tokens' weights, "expert_tokens": how many went to each expert of a mixture); the largest relative logit
    difference that the rotations made (None without any); the divergence from the dense model's predictions before and
    after tuning the model as a whole, in nats per token (None without)."""

    layers: list[LinearReport]
    blocks: list[dict[str, Any]]
    rotation_error: float | None
    divergence: tuple[float, float] | None


def write_checkpoint(model: DenseModel, plan: Plan, report: Report, work: Workspace) -> None:
    """Write weights, config, tokenizer files and the per-layer report into the workspace's final directory."""
    final = work.final_directory()
    write_shards(final, _tensors(model, plan, work))
    copy_companions(model.directory, final)
    _write_json(final / "config.json", _config(model, plan))
    layers: dict[str, Any] = {
        "recipe": asdict(plan.recipe),
        "rotation_error": report.rotation_error,
        "divergence": report.divergence,
        "spectrum": None if plan.rotations.spectrum is None else plan.rotations.spectrum.to_dict(),
        "blocks": report.blocks,
        "layers": [layer.to_dict() for layer in report.layers],
    }
    _write_json(final / LAYERS_FILE, layers)
    write_hashes(final)


def _tensors(model: DenseModel, plan: Plan, work: Workspace) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint under its full name, one block in memory at a time."""
    family, rotations = model.blocks.family, plan.rotations
    rows = model.get(model.embedding_name)
    if rotations.residual is None:
        yield model.embedding_name, model.to_storage(rows, model.embedding_name)
    else:
        yield model.embedding_name, model.to_storage(rotate_rows(rows, rotations.residual), model.embedding_name)
    for index in range(model.blocks.sizes.num_blocks):
        for name, tensor in sorted(finished_block(work, index).items()):
            yield family.block_prefix(index) + name, tensor
    yield model.final_norm_name, model.to_storage(final_gain(model, rotations), model.final_norm_name)
    if plan.recipe.quantizes_head:
        saved = work.load(HEAD_STEP)
        assert saved is not None
        for name, tensor in sorted(saved[0].items()):
            yield f"{family.head}.{name}", tensor
    elif plan.unties_head or not model.is_tied:
        head_name = f"{family.head}.weight"
        yield head_name, model.to_storage(head_rows(model, rotations), head_name)


def _config(model: DenseModel, plan: Plan) -> dict[str, Any]:
    """The source's config.json with the quantization_config."""
    config: dict[str, Any] = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = model.is_tied and not plan.unties_head
    family = plan.model.family
    per_block = [plan.formats(index) for index in range(len(plan.choices))]
    default, overrides = shared_formats(per_block, family)
    sizes = set.intersection(*(set(_tp_sizes(model, fmts)) for fmts in per_block))
    head = plan.head_format()
    if head is not None:
        overrides[family.head] = head
        sizes &= set(allowed_sizes([(head, *model.blocks.head_size(), "out")]))
    kept = (family.head,) if head is None else ()
    quantization = CheckpointConfig(default, overrides, kept, plan.recipe.name, tp_sizes=tuple(sorted(sizes)))
    return config | {"quantization_config": quantization.to_dict()}


def _tp_sizes(model: DenseModel, fmts: dict[str, LinearFormat]) -> tuple[int, ...]:
    """The numbers of ranks every linear can be cut between: along its outputs where it reads the residual stream."""
    family, sizes = model.blocks.family, model.blocks.linear_sizes()
    linears: list[tuple[LinearFormat, int, int, Cut]] = []
    for site in family.sites:
        for linear in site.linears:
            k, n = sizes[linear]
            linears.append((fmts[linear], k, n, "out" if site.reads == "residual" else "in"))
    return allowed_sizes(linears)


def shared_formats(
    per_block: list[dict[str, LinearFormat]], family: Family
) -> tuple[LinearFormat, dict[str, LinearFormat]]:
    """(default, overrides) that say the format of every linear in few words: the most common of all, then the most
    common of each linear under its path inside a block, then single ones under their full names."""
    default = Counter(fmt for fmts in per_block for fmt in fmts.values()).most_common(1)[0][0]
    overrides: dict[str, LinearFormat] = {}
    for linear in per_block[0]:
        usual = Counter(fmts[linear] for fmts in per_block).most_common(1)[0][0]
        if usual != default:
            overrides[config_key(linear)] = usual
        for index, fmts in enumerate(per_block):
            if fmts[linear] != usual:
                overrides[family.block_prefix(index) + linear] = fmts[linear]
    return default, overrides


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
