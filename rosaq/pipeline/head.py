"""The output head as one more site behind the last block: it reads the final norm of the residual stream.

It is quantised last, on the stream of the finished model, and its rows in parts: a vocabulary is many times wider than
any site of a block, and rows do not know of each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel, Gram, Tokens
from rosaq.pipeline.memory import release_freed_memory
from rosaq.pipeline.plan import Plan
from rosaq.pipeline.rotations import Rotations
from rosaq.pipeline.site import SHARED, LinearReport, SitePlan, Tensors
from rosaq.pipeline.source import DenseModel
from rosaq.pipeline.workspace import Workspace
from rosaq.rotation import inverse_transpose, rotate_blocks, rotate_rows, unit_gain

HEAD_STEP = "head"  # of the workspace


def final_gain(dense: DenseModel, rotations: Rotations) -> Tensor:
    """Weight [d] of the final norm in the stream that the quantised model runs in: its gain is then in the head."""
    gain = dense.get(dense.final_norm_name)
    return gain if rotations.residual is None else unit_gain(gain, dense.blocks.family)


def head_rows(dense: DenseModel, rotations: Rotations, rows: slice | None = None) -> Tensor:
    """The head [vocab, d] (or `rows` of it) that reads `final_gain`'s norm in that stream, float32."""
    head = dense.get(dense.head_name, rows)
    if rotations.residual is None:
        return head
    return rotate_rows(head, rotations.residual, dense.get(dense.final_norm_name) + dense.blocks.family.gain_offset)


def quantize_head(
    dense: DenseModel,
    plan: Plan,
    stream: Callable[[], list[Tensor]],
    work: Workspace,
    progress: Callable[[int, int], None],
) -> LinearReport:
    """Quantise the head as `plan` says and save it in the workspace, or read back what an earlier run saved.

    stream(): this rank's batches [batch, length, d] of the calibration text behind the last finished block; called only
    where the recipe looks at tokens. progress is called with (parts done, parts).
    """
    saved = work.load(HEAD_STEP)
    if saved is not None:
        return LinearReport(**saved[1]["report"])
    site = plan.head
    assert site is not None
    gram = _moments(dense, plan.rotations, site, stream()) if plan.recipe.needs_tokens else None
    stored, energies = _in_parts(dense, plan.rotations, site, gram, progress)
    vocab, hidden = stored["qweight"].shape[0], dense.blocks.sizes.hidden
    report = site.report(dense.blocks.family.head, stored, vocab * hidden, energies, gram)
    work.save(HEAD_STEP, stored, {"report": report.to_dict()})
    return report


def _moments(dense: DenseModel, rotations: Rotations, site: SitePlan, stream: list[Tensor]) -> Tensor:
    """Second moments [d, d] of what the head reads, every token counting the same: importance is a block's."""
    gain, gram = final_gain(dense, rotations), Gram(dense.blocks.sizes.hidden, dense.device)
    for hidden in stream:
        x = dense.blocks.final_norm(hidden, gain).flatten(0, -2)
        try:
            gram.add_tokens(Tokens(x if site.rotation is None else rotate_blocks(x, site.rotation)))
        except ValueError as error:
            raise ValueError(f"{dense.blocks.family.head}: {error}") from error
    return gram.sum_over_ranks().mean()


def rows_at_once(model: BlockModel) -> int:
    """Rows of the head that are quantised together: as many as the widest site of a block that reads the stream has, so
    that the head takes no more memory than a block."""
    sizes, sites = model.linear_sizes(), model.family.sites_reading("residual")
    return max(sum(sizes[linear][1] for linear in site.linears) for site in sites)


def _in_parts(
    dense: DenseModel,
    rotations: Rotations,
    site: SitePlan,
    gram: Tensor | None,
    progress: Callable[[int, int], None],
) -> tuple[Tensors, Tensor]:
    """(the head's tensors as stored, `SitePlan.energies` of all rows)."""
    name, (_, vocab) = dense.blocks.family.head, dense.blocks.head_size()
    step = rows_at_once(dense.blocks)
    starts = range(0, vocab, step)
    parts, energies = list[Tensors](), torch.zeros(2, dtype=torch.float64, device=dense.device)
    for number, start in enumerate(starts):
        w = head_rows(dense, rotations, slice(start, min(start + step, vocab)))
        if site.rotation is not None:
            w = rotate_blocks(w.double(), inverse_transpose(site.rotation)).float()
        parts.append(site.quantize(w, gram, name))
        energies += site.energies(w, parts[-1], gram)
        release_freed_memory()
        progress(number + 1, len(starts))
    first = parts[0]
    return {key: first[key] if key in SHARED else torch.cat([p[key] for p in parts]) for key in first}, energies
