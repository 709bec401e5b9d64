"""One quantised linear as a differentiable function of what it stores: codes, scales, salient weights.

Whatever is rounded on disk is rounded in the forward pass too, with the gradient passed straight through, so the block
that is tuned is the block that will be stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from rosaq.config import LinearFormat
from rosaq.layout import pack, unpack, zero_points
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
        self._format = fmt
        # codes that stay are on disk already: kept here too, they would be half as much memory again
        self._stored = {key: t for key, t in stored.items() if key != "qweight" or weight is not None}
        self._scale = stored["scales"].float()[..., None]
        middle = torch.full_like(self._scale, 2 ** (fmt.bits - 1))
        self._zero = zero_points(stored["zeros"])[..., None] if "zeros" in stored else middle
        n, groups = stored["scales"].shape
        codes = unpack(stored["qweight"], fmt.bits).view(n, groups, -1)
        k = groups * codes.shape[2]
        self.stretch = torch.zeros_like(self._scale).requires_grad_()
        self.shift: Tensor | None = None
        if fmt.num_salient:
            self.shift = torch.zeros(n, fmt.num_salient, device=self._scale.device).requires_grad_()
            self._unit = self._scale.abs().mean()
            is_index = fmt.salient == "index"
            basis = one_hot(stored["salient_index"].long(), k).T if is_index else stored["salient_basis"]
            self._directions = basis.float()
            # what the whole weight does on them; codes may then change without touching it
            bulk = ((codes - self._zero) * self._scale).view(n, k)
            self._wanted = stored["salient_weight"].float() + bulk @ self._directions
        self.latent: Tensor | None = None
        if weight is None:
            self._half_steps = (2 * codes - 2 * self._zero).to(torch.int8)
            self._steps_on_directions = self._on_directions(self._half_steps.flatten(1).float() / 2)
        else:
            exact = weight.view(n, groups, -1) / self._scale + self._zero
            self.latent = (codes + (exact - codes).clamp(-_NEAR, _NEAR)).requires_grad_()

    def _scales(self) -> Tensor:
        return _through(self._scale * (1 + self.stretch), torch.float16)

    def _salient(self, of_codes: Tensor | None) -> Tensor | None:
        """salient_weight [n, r] as stored; of_codes [n, r]: what the low-bit part does on the directions."""
        if self.shift is None:
            return None
        assert of_codes is not None
        return _through(self._wanted + self.shift * self._unit - of_codes, torch.float16)

    def _bulk(self, scales: Tensor) -> Tensor:
        """The low-bit part [n, k]."""
        if self.latent is None:
            rounded = self._half_steps * (scales / 2)
        else:
            rounded = _Rounded.apply(self.latent, scales, self._zero, self._format.bits)  # type: ignore[no-untyped-call]
        return rounded.flatten(1)

    def _on_directions(self, bulk: Tensor) -> Tensor | None:
        return None if self.shift is None else bulk @ self._directions

    def _whole(self, bulk: Tensor, salient: Tensor | None) -> Tensor:
        """The dense [n, k] weight that acts on x."""
        return self._of_plain_x(bulk if salient is None else bulk.addmm(salient, self._directions.T))

    def _of_plain_x(self, w: Tensor) -> Tensor:
        """Rows [.., k] that act on the rotated x, as such that act on x."""
        if not self._format.rotation_size:
            return w
        return rotate_blocks(w, self._stored["rotation"].float().transpose(-1, -2))

    def weight(self) -> Tensor:
        """The dense [n, k] float32 weight that acts on x, differentiable in latent, stretch and shift."""
        bulk = self._bulk(self._scales())
        return self._whole(bulk, self._salient(self._on_directions(bulk)))

    def product(self, x: Tensor) -> Tensor:
        """x [..., k] · weight()ᵀ -> [..., n], differentiable in x, latent, stretch and shift. Where codes stay and a
        row has one scale, the gradient [n, k] of the weight, only to be summed over rows, is never made."""
        weight_in_float32 = torch.autocast(x.device.type, enabled=False)  # whatever it then multiplies in
        if self.latent is not None or self._scale.shape[1] > 1:
            with weight_in_float32:
                weight = self.weight()
            return linear(x, weight)
        with weight_in_float32:
            scales = self._scales()
            steps = self._steps_on_directions
            salient = self._salient(None if steps is None else scales.flatten(1) * steps)
            with torch.no_grad():
                weight = self._whole(self._bulk(scales), salient)
            directions = None if salient is None else self._of_plain_x(self._directions.T)
        y: Tensor = _FixedCodes.apply(x, scales.flatten(), salient, weight, directions)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def stored(self) -> Tensors:
        """The disk tensors that stand for `weight()`, bit for bit; without the codes where they stay."""
        tensors = dict(self._stored)
        if self.latent is not None:
            codes = self.latent.round().clamp(0, 2**self._format.bits - 1)
            tensors["qweight"] = pack(codes.flatten(1).to(torch.uint8), self._format.bits)
        tensors["scales"] = self._scales()[..., 0].to(torch.float16)
        if self.shift is not None:
            salient = self._salient(self._on_directions(self._bulk(self._scales())))
            assert salient is not None
            tensors["salient_weight"] = salient.to(torch.float16)
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
        inside = torch.ops.aten.hardtanh_backward(grad, latent, -0.5, ctx.top + 0.5)
        return inside.mul_(scale), torch.einsum("ngk,ngk->ng", grad, steps)[..., None], None, None


class _FixedCodes(torch.autograd.Function):
    """x · weightᵀ for weight [n, k] = codes * scales [n] + salient [n, r] · directions [r, k], with gradients for x,
    scales and salient. In the dtype of autocast, as torch's linear is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, salient: Tensor | None, weight: Tensor, directions: Tensor | None
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        narrow, weight = x.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            y = linear(narrow, weight)
            seen = None if directions is None else linear(narrow, directions.to(dtype))
        ctx.save_for_backward(y, seen, scales, salient, weight)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        y, seen, scales, salient, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        # Scaling a row by 1 + e adds e times what its codes give to y, which is all of y but the salient part.
        by_row, of_salient = (grad * y.flatten(0, -2)).sum(0, dtype=torch.float32), None
        if salient is not None:
            of_salient = (grad.T @ seen.flatten(0, -2)).float()
            by_row = by_row - (of_salient * salient).sum(1)
        of_scales = torch.where(scales == 0, 0, by_row / scales)
        return (grad @ weight).view(*y.shape[:-1], -1).to(ctx.dtype), of_scales, of_salient, None, None


def _through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype` and back, with the gradient of the identity."""
    return value + (value.detach().to(dtype).float() - value.detach())
