"""RosaqLinears that read the same x (q, k, v; gate, up): on the CPU the first that is called computes all of them.

Rotation, salient part and digits of x are then made once, and one parallel loop runs over all weights. Every linear
keeps its own tensors, so saving, moving and calling one alone are as without.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rosaq import ops
from rosaq.linear import RosaqLinear

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # attributes of one parent
_SAME = ("salient_index", "salient_basis", "rotation")  # act on x before any row of W does


class Siblings:
    """Packed linears of one format, bias or none, salient set and rotation; ValueError otherwise.

    The outputs of those that are still to be called wait here, with a weak reference to x, until they are fetched or
    another x comes. Not used while tracing, nor for an x of inference mode: such tensors do not tell when they change.
    """

    def __init__(self, linears: Sequence[RosaqLinear]) -> None:
        if not can_share(linears):
            raise ValueError(f"linears: got {[repr(linear) for linear in linears]}, need packed siblings on the CPU")
        self.linears = tuple(linears)
        self._waiting: tuple[weakref.ref[Tensor], int, dict[int, Tensor]] | None = None
        # What every token needs, found once; the dicts, not the tensors, which their modules may replace.
        first, k = self.linears[0], self.linears[0].held[0]
        self._ids = [id(linear) for linear in self.linears]
        self._buffers = [linear._buffers for linear in self.linears]
        self._held = [linear._parameters for linear in self.linears]
        self._has_salient, self._has_bias = first.salient_weight is not None, first.bias is not None
        self._sizes: dict[str, Any] = {
            "out_features": [linear.held[1] for linear in self.linears],
            "bits": first.format.bits,
            "group_size": first.format.group_size_of(k),
            "symmetric": first.format.symmetric,
        }
        for linear in self.linears:
            linear.siblings = self

    def compute(self, linear: RosaqLinear, x: Tensor) -> Tensor:
        """y of `linear`, as its own forward gives it, bit for bit."""
        waiting = self._waiting  # read once: another thread may put its own here
        if waiting is not None and waiting[0]() is x and waiting[1] == x._version:
            y = waiting[2].pop(id(linear), None)
            if not waiting[2]:
                self._waiting = None
            if y is not None:
                return y
        ys = self._compute_all(x)
        left = dict(zip(self._ids, ys, strict=True))
        y = left.pop(id(linear))
        self._waiting = (weakref.ref(x), x._version, left)
        return y

    def _compute_all(self, x: Tensor) -> list[Tensor]:
        held = self._held
        return ops.fused_gemms(
            x,
            [cast(Tensor, buffers["packed"]) for buffers in self._buffers],
            [cast(Tensor, each["salient_weight"]) for each in held] if self._has_salient else [],
            held[0]["salient_index"],
            held[0]["salient_basis"],
            held[0]["rotation"],
            [cast(Tensor, each["bias"]) for each in held] if self._has_bias else [],
            **self._sizes,
        )

    def part(self) -> None:
        """Let every linear compute alone again, and drop what waits."""
        self._waiting = None
        for linear in self.linears:
            linear.siblings = None


def can_share(linears: Sequence[RosaqLinear]) -> bool:
    """True where one call can compute all of `linears` from one x, and this machine's CPU does."""
    one = linears[0]
    return 1 < len(linears) <= ops.MAX_WEIGHTS and all(
        linear.packed is not None
        and linear.packed.device.type == "cpu"
        and linear.siblings is None
        and linear.format == one.format
        and linear.held[0] == one.held[0]
        and (linear.bias is None) == (one.bias is None)
        and all(_equal(getattr(linear, name), getattr(one, name)) for name in _SAME)
        for linear in linears
    )


def join_siblings(model: nn.Module) -> int:
    """Join the linears of `SHARED_INPUT` under every module of `model`, where they can share; how many calls it saves.

    Joined linears are for models that call all of them with the same x, as the supported families do.
    """
    saved = 0
    for module in model.modules():
        for names in SHARED_INPUT:
            linears = [child for name in names if isinstance(child := getattr(module, name, None), RosaqLinear)]
            if len(linears) == len(names) and can_share(linears):
                Siblings(linears)
                saved += len(linears) - 1
    return saved


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
