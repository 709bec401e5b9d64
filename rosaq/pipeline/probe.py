"""The proof that folding and rotating changed nothing: a short probe goes through both models, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel
from rosaq.pipeline.block import online
from rosaq.rotation import BlockRotations

TOLERANCE = 1e-3  # relative to the largest magnitude; float32 models agree to about 1e-5
MAX_TOKENS = 128


@dataclass(frozen=True)
class Probe:
    """Hidden states [1, tokens, d] of the same text in the dense model and in its rotated copy."""

    dense: Tensor
    rotated: Tensor

    def step(
        self,
        model: BlockModel,
        index: int,
        dense: dict[str, Tensor],
        rotated: dict[str, Tensor],
        rotations: BlockRotations,
    ) -> Probe:
        """Both through block `index`; ValueError if they part."""
        out = Probe(
            model.run(index, dense, self.dense),
            model.run(index, online(rotated, model.family, rotations), self.rotated),
        )
        back = out.rotated if rotations.residual is None else (out.rotated.double() @ rotations.residual.T).float()
        check_equal(back, out.dense, f"{model.family.block_prefix(index)[:-1]}")
        return out


def check_equal(got: Tensor, want: Tensor, what: str) -> float:
    """The largest difference relative to the largest magnitude; ValueError above TOLERANCE."""
    if not torch.isfinite(want).all():
        raise ValueError(f"activations: {what}: got NaN or Inf from the dense model, need finite numbers")
    error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    if not error <= TOLERANCE:
        raise ValueError(
            f"rotation: {what}: the folded and rotated model differs by {error:.2e} of the largest value, need at most "
            f"{TOLERANCE:.0e}: this architecture does not fit its family's table"
        )
    return error
