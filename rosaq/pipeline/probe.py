"""The proof that folding and rotating changed nothing: a short probe goes through both models, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rosaq.calibrate import BlockModel
from rosaq.pipeline.block import online
from rosaq.rotation import BlockRotations

TOLERANCE = 1e-3  # relative to the largest magnitude; float32 models agree to about 1e-5
MAX_TOKENS = 128
# Of a mixture's tokens, that may differ: a router's choice between nearly equal experts hangs on the last bits.
_MAY_BE_ROUTED_ELSEWHERE = 1 / 32


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
        """Both through block `index`; ValueError if they part. Of a mixture, every block starts from the dense hidden
        states, and a few tokens may part: another expert would be another token for all blocks behind."""
        out = Probe(
            model.run(index, dense, self.dense),
            model.run(index, online(rotated, model.family, rotations), self.rotated),
        )
        residual, is_mixture = rotations.residual, any(site.expert is not None for site in model.family.sites)
        back = out.rotated if residual is None else (out.rotated.double() @ residual.T).float()
        name = model.family.block_prefix(index)[:-1]
        check_equal(back, out.dense, name, _MAY_BE_ROUTED_ELSEWHERE if is_mixture else 0.0)
        if is_mixture:
            again = out.dense if residual is None else (out.dense.double() @ residual).float()
            out = replace(out, rotated=again)
        return out


def check_equal(got: Tensor, want: Tensor, what: str, spared: float = 0.0) -> float:
    """The largest difference of any token [.., tokens, d] relative to the largest magnitude, but for a share `spared`
    of the tokens; ValueError above TOLERANCE."""
    if not torch.isfinite(want).all():
        raise ValueError(f"activations: {what}: got NaN or Inf from the dense model, need finite numbers")
    by_token = (got - want).abs().amax(-1).flatten().sort().values
    worst = by_token[len(by_token) - 1 - int(spared * len(by_token))]
    error = (worst / want.abs().max().clamp_min(1e-30)).item()
    if not (error <= TOLERANCE and torch.isfinite(got).all()):
        raise ValueError(
            f"rotation: {what}: the folded and rotated model differs by {error:.2e} of the largest value, need at most "
            f"{TOLERANCE:.0e}: this architecture does not fit its family's table"
        )
    return error
