"""One quantised linear as a differentiable function of what it stores: codes, scales, salient weights.

Whatever is rounded on disk is rounded in the forward pass too, with the gradient passed straight through, so the block
that is tuned is the block that will be stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosaq.config import LinearFormat
from rosaq.layout import pack, unpack
from rosaq.rotation import rotate_blocks

Tensors = dict[str, Tensor]
# A latent code starts at most this far from its integer, so that a single step cannot move it: GPTQ chose many codes
# that are not the nearest ones, for good reason.
_NEAR = 0.45


class TunedLinear:
    """Trainable view of the stored tensors of a linear [n, k] with dense weight `weight` (rotated, float32; None: the
    codes stay as they are, and take a byte each instead of twelve).

    latent   [n, groups, group_size]: codes before rounding; the codes stored now are its rounding. None: codes stay.
    stretch  [n, groups, 1]: scales are multiplied by 1 + stretch.
    shift    [n, r] in units of the mean scale, added to the weights of the salient directions (r = 0: None).
    """

    def __init__(self, weight: Tensor | None, stored: Tensors, fmt: LinearFormat) -> None:
        self._format, self._stored = fmt, stored
        self._scale = stored["scales"].float()[..., None]
        middle = torch.full_like(self._scale, 2 ** (fmt.bits - 1))
        self._zero = stored["zeros"].float()[..., None] if "zeros" in stored else middle
        n, groups = stored["scales"].shape
        self._codes = unpack(stored["qweight"], fmt.bits).view(n, groups, -1)
        k = groups * self._codes.shape[2]
        self.latent: Tensor | None = None
        if weight is not None:
            exact = weight.view(n, groups, -1) / self._scale + self._zero
            self.latent = (self._codes + (exact - self._codes).clamp(-_NEAR, _NEAR)).requires_grad_()
        self.stretch = torch.zeros_like(self._scale).requires_grad_()
        self.shift: Tensor | None = None
        if fmt.num_salient:
            self.shift = torch.zeros(n, fmt.num_salient, device=self._scale.device).requires_grad_()
            self._unit = self._scale.abs().mean()
            self._bulk_columns = torch.ones(k, device=self._scale.device)
            self._directions = stored["salient_weight"].float()
            if fmt.salient == "index":
                self._bulk_columns[stored["salient_index"].long()] = 0
            else:  # what the whole weight does on the basis; codes may then change without touching it
                w_hat = ((self._codes - self._zero) * self._scale).view(n, k)
                self._directions = self._directions + w_hat @ stored["salient_basis"].float()

    def _scales(self) -> Tensor:
        return _through(self._scale * (1 + self.stretch), torch.float16)

    def _salient(self, bulk: Tensor) -> Tensor:
        """salient_weight [n, r] as stored, for the low-bit part `bulk` [n, k]."""
        assert self.shift is not None
        wanted = self._directions + self.shift * self._unit
        if self._format.salient == "basis":
            wanted = wanted - bulk @ self._stored["salient_basis"].float()
        return _through(wanted, torch.float16)

    def _bulk(self) -> Tensor:
        if self.latent is None:
            rounded = (self._codes - self._zero) * self._scales()
        else:
            rounded = _Rounded.apply(self.latent, self._scales(), self._zero, self._format.bits)  # type: ignore[no-untyped-call]
        bulk = rounded.flatten(1)
        return bulk * self._bulk_columns if self.shift is not None and self._format.salient == "index" else bulk

    def weight(self) -> Tensor:
        """The dense [n, k] float32 weight that acts on x, differentiable in latent, stretch and shift."""
        w = bulk = self._bulk()
        if self.shift is not None:
            salient = self._salient(bulk)
            if self._format.salient == "index":
                w = bulk.index_add(1, self._stored["salient_index"].long(), salient)
            else:
                w = bulk + salient @ self._stored["salient_basis"].float().T
        if self._format.rotation_size:
            w = rotate_blocks(w, self._stored["rotation"].float().transpose(-1, -2))
        return w

    @torch.no_grad()
    def stored(self) -> Tensors:
        """The disk tensors that stand for `weight()`, bit for bit."""
        tensors = dict(self._stored)
        if self.latent is not None:
            codes = self.latent.round().clamp(0, 2**self._format.bits - 1)
            if self.shift is not None and self._format.salient == "index":
                kept = (self._bulk_columns == 0).view(1, codes.shape[1], -1)
                codes = torch.where(kept, self._zero, codes)
            tensors["qweight"] = pack(codes.flatten(1).to(torch.uint8), self._format.bits)
        tensors["scales"] = self._scales()[..., 0].to(torch.float16)
        if self.shift is not None:
            tensors["salient_weight"] = self._salient(self._bulk()).to(torch.float16)
        return tensors


class _Rounded(torch.autograd.Function):
    """(clamp(round(latent)) - zero) * scale; the gradient passes the rounding, and stops where a code is clamped."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        steps = latent.round().clamp_(0, 2**bits - 1).sub_(zero)
        ctx.save_for_backward(latent, steps, scale)
        ctx.top = 2**bits - 1
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        latent, steps, scale = ctx.saved_tensors
        inside = (latent > -0.5) & (latent < ctx.top + 0.5)
        return grad * scale * inside, (grad * steps).sum(-1, keepdim=True), None, None


def _through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype` and back, with the gradient of the identity."""
    return value + (value.detach().to(dtype).float() - value.detach())
