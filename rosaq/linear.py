"""RosaqLinear: a drop-in for `nn.Linear` whose weight is INT3/INT4 plus a few 16-bit directions.

Two states, one copy in memory. *Loaded*: the tensors of the disk layout are plain Parameters. *Packed*: `qweight`,
`scales` and `zeros` are released and only their backend's order `packed` (1-D uint8) is held; `state_dict`, `.to()`
another device, `copy.deepcopy` and pickling rebuild the disk layout, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rosaq import ops
from rosaq.config import LinearFormat
from rosaq.input_gradient import InputGradient
from rosaq.layout import dense_weight
from rosaq.sharding import Piece
from rosaq.soundness import check_index, tensor_problem
from rosaq.specs import QuantSpec

if TYPE_CHECKING:
    from rosaq.siblings import Siblings

PACKED_NAMES = ("qweight", "scales", "zeros")


class RosaqLinear(nn.Module):
    """y [.., n] = t · Ŵᵀ + s · Cᵀ + bias with t = x [.., k] · blockdiag(rotation), s the salient part of t.

    `in_features` k and `out_features` n are the full widths, also on a shard; `held` are those of the tensors that are
    here. Nothing is trainable; gradients pass through to x. Storage dtypes are those of the disk layout and stay so
    under `.half()`, `.bfloat16()`, `.float()`; the activations decide the dtype of the result.
    """

    # transformers' tensor parallelism hands such modules plain tensors.
    _hf_quantized_needs_local_tp = True

    packed: Tensor | None
    scales: nn.Parameter | None
    qweight: nn.Parameter | None
    zeros: nn.Parameter | None
    salient_weight: nn.Parameter | None
    salient_index: nn.Parameter | None
    salient_basis: nn.Parameter | None
    rotation: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: LinearFormat,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        format.check_sizes(in_features, out_features, type(self).__name__)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.held = (in_features, out_features)
        self.piece: Piece | None = None
        self.tensor_shapes = format.tensor_shapes(in_features, out_features, bias=bias)
        for name in (*PACKED_NAMES, "salient_weight", "salient_index", "salient_basis", "rotation", "bias"):
            self.register_parameter(name, None)
        for name, (shape, dtype) in self.tensor_shapes.items():
            # Floats start as NaN, so that a tensor which was never loaded is found by `check`, not by its users.
            value = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            if value.is_floating_point() and value.device.type != "meta":
                value.fill_(torch.nan)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("packed", None, persistent=False)
        self.siblings: Siblings | None = None  # see rosaq/siblings.py

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], format: LinearFormat, *, name: str = "linear") -> RosaqLinear:
        """The packed module made of one linear's disk-layout tensors; ValueError, with `name`, as `check` tells."""
        if "qweight" not in tensors:
            raise ValueError(f"{name}.qweight: got no such tensor among {sorted(tensors)}, need it")
        if tensors["qweight"].ndim != 2:
            raise ValueError(f"{name}.qweight: got shape {list(tensors['qweight'].shape)}, need [out_features, words]")
        out_features, num_words = tensors["qweight"].shape
        in_features = num_words * 32 // format.bits
        linear = cls(in_features, out_features, format, bias="bias" in tensors, device="meta")
        unknown = sorted(set(tensors) - set(linear.tensor_shapes))
        if unknown:
            raise ValueError(f"{name}: got tensors {unknown}, need only {list(linear.tensor_shapes)}")
        for key, tensor in tensors.items():
            # The op would copy what is not contiguous at every call.
            linear.register_parameter(key, nn.Parameter(tensor.contiguous(), requires_grad=False))
        linear.check(name)
        linear.pack()
        return linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        gram: Tensor | None = None,
        spec: QuantSpec | None = None,
        *,
        salient_index: Tensor | None = None,
    ) -> RosaqLinear:
        """Quantise a dense layer.

        gram           second moments of its inputs, Xᵀ X float64 [k, k]; None only with `spec.method == "rtn"`.
        spec           bits, group size and method; `QuantSpec()` where None.
        salient_index  int64 [r], input channels that stay in 16 bits.
        """
        if salient_index is not None:
            if not isinstance(salient_index, Tensor) or salient_index.dtype != torch.int64 or salient_index.ndim != 1:
                raise ValueError(f"salient_index: got {salient_index!r}, need an int64 tensor [r]")
            check_index(salient_index, linear.in_features, type(linear).__name__)
        # The one way from run time to the offline half, imported when used: serving must not load it.
        from rosaq.quantizers import quantize_weight

        spec = spec if spec is not None else QuantSpec()
        tensors = quantize_weight(linear.weight.detach(), gram, spec, salient_index)
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach().to(torch.float16)
        num_salient = 0 if salient_index is None else len(salient_index)
        fmt = LinearFormat(spec.bits, spec.group_size, spec.symmetric, num_salient)
        return cls.from_tensors({name: tensor.to(linear.weight.device) for name, tensor in tensors.items()}, fmt)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., k] float16, bfloat16 or float32 -> y [.., n] of the same dtype, differentiable in x."""
        if x.requires_grad and torch.is_grad_enabled():
            # Not self.forward: hooks of accelerate and of tensor parallelism stand there, and have run already.
            run = partial(RosaqLinear.forward, self)
            return cast(Tensor, InputGradient.apply(x, run, self._weight_later()))  # type: ignore[no-untyped-call]
        packed, qweight = self._buffers["packed"], self._parameters["qweight"]
        siblings = self.siblings
        if siblings is not None and qweight is None and not torch.compiler.is_compiling() and not x.is_inference():
            return siblings.compute(self, x)
        if packed is None or qweight is not None:
            self.check(type(self).__name__)
            if self.is_offloaded or packed is not None:
                # The hook (or torch.func.functional_call, beside what is packed) takes the Parameters away after this
                # call and needs them to be there.
                packed = self._packed_tensor()
            else:
                self.pack()
                packed = cast(Tensor, self.packed)
        return self._gemm(x, packed, self._parameters["bias"])

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` of a packed module with a bias [n] from elsewhere, for engines that hold it themselves."""
        return self._gemm(x, cast(Tensor, self.packed), bias)

    def _gemm(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        fmt, held = self.format, self._parameters  # not self.rotation and so on: nn.Module looks those up slowly
        y: Tensor = ops.fused_gemm(
            x,
            packed,
            salient_weight=held["salient_weight"],
            salient_index=held["salient_index"],
            salient_basis=held["salient_basis"],
            rotation=held["rotation"],
            bias=bias,
            out_features=self.held[1],
            bits=fmt.bits,
            group_size=fmt.group_size_of(self.held[0]),
            symmetric=fmt.symmetric,
        )
        return y

    # --- the two states -------------------------------------------------------------------------------------------

    def pack(self) -> None:
        """Loaded -> packed; nothing where it is packed already, or where tensors are on the meta device or away."""
        if self.packed is not None or self.is_offloaded:
            return
        if any(tensor.device.type == "meta" for tensor in self._parameters.values() if tensor is not None):
            return
        self.packed = self._packed_tensor()
        for name in PACKED_NAMES:
            self._parameters[name] = None

    def unpack(self) -> None:
        """Packed -> loaded, bit-exact; nothing where it is loaded already. Siblings part, as tensors may change now."""
        if self.packed is None:
            return
        if self.siblings is not None:
            self.siblings.part()
        for name, tensor in self._disk_tensors().items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self.packed = None

    def hold_shard(self, tensors: dict[str, Tensor], format: LinearFormat, name: str) -> None:
        """Hold one rank's tensors, cut as `rosaq.sharding` tells, in place of all of them; ValueError as `check`."""
        if self.siblings is not None:
            self.siblings.part()
        out_features, num_words = tensors["qweight"].shape
        self.held, self.format = (num_words * 32 // format.bits, out_features), format
        self.tensor_shapes = format.tensor_shapes(*self.held, bias="bias" in tensors)
        self.packed = None
        for key in self._parameters:
            tensor = tensors.get(key)
            self._parameters[key] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        self.check(name)
        self.pack()

    def _packed_tensor(self) -> Tensor:
        qweight, scales = cast(Tensor, self.qweight), cast(Tensor, self.scales)
        ops.check_device(qweight.device)
        packed: Tensor = ops.prepack(qweight, scales, self.zeros, self.format.bits)
        return packed

    def _disk_tensors(self) -> dict[str, Tensor]:
        """qweight, scales and zeros of the disk layout, whichever state the module is in."""
        if self.packed is None:
            values: Any = (self.qweight, self.scales, self.zeros)
        else:
            values = ops.unprepack(self.packed)
        return {
            name: tensor
            for name, tensor in zip(PACKED_NAMES, values, strict=True)
            if tensor is not None and name in self.tensor_shapes
        }

    @property
    def is_offloaded(self) -> bool:
        """True where accelerate moves this module's Parameters in and out around every call."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))

    # --- what nn.Module does with Parameters ------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        rebuilt = self._disk_tensors()
        for name in self.tensor_shapes:
            tensor = rebuilt[name] if name in rebuilt else cast(Tensor, self._parameters[name])
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unpack()
        before = len(missing_keys) + len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(missing_keys) + len(error_msgs) == before:
            self.check(prefix.rstrip(".") or type(self).__name__)
            self.pack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RosaqLinear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Through the original: float16 -> bfloat16 -> float16 would lose bits.
            return result if result.dtype == tensor.dtype else tensor.to(device=result.device)

        if self.packed is None or fn(self.packed[:0]).device == self.packed.device:
            super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        else:
            # Every backend has its own order, so the disk layout travels.
            self.unpack()
            super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
            self.pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The loaded state: what is pickled here may be read where another backend is active."""
        state = self.__dict__.copy()
        state["siblings"] = None  # a copy of one is no copy of the others
        if self.packed is not None:
            rebuilt = {name: nn.Parameter(t, requires_grad=False) for name, t in self._disk_tensors().items()}
            state["_parameters"] = {**self._parameters, **rebuilt}
            state["_buffers"] = {**self._buffers, "packed": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()

    # --- looking at it ----------------------------------------------------------------------------------------------

    def check(self, name: str) -> None:
        """ValueError naming `name`, the tensor, what it is and what is needed, unless every tensor is sound.

        Checks presence, shape, dtype, NaN and Inf, and that `salient_index` holds different channels of [0, k).
        """
        for key, (shape, dtype) in self.tensor_shapes.items():
            if self.packed is not None and key in PACKED_NAMES:
                continue
            problem = tensor_problem(self._parameters[key], shape, dtype)
            if problem is not None:
                raise ValueError(f"{name}.{key}: {problem}")
        if self.salient_index is not None:
            check_index(self.salient_index, self.held[0], name)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The dense weight float32 [n, k] that gives y = x · weightᵀ + bias: salient and rotation included. ValueError
        where its tensors are away: offloaded, or never loaded."""
        held = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        away = [name for name, tensor in held.items() if tensor.device.type == "meta"]
        if away:
            raise ValueError(f"{away[0]}: got a tensor on the meta device, need it here (offloaded, or not loaded yet)")
        return dense_weight(held | self._disk_tensors(), self.format)

    def _weight_later(self) -> Callable[[], Tensor]:
        """`dequantize` for the way back; offloaded tensors, which are here only now, are held until then."""
        if not self.is_offloaded:
            return self.dequantize
        held = {name: tensor.detach() for name, tensor in self._parameters.items() if tensor is not None}
        return lambda: dense_weight(held, self.format)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight: every tensor but the bias, over n * k."""
        num_bytes: int = sum(
            math.prod(shape) * getattr(torch, dtype).itemsize
            for name, (shape, dtype) in self.tensor_shapes.items()
            if name != "bias"
        )
        return 8 * num_bytes / math.prod(self.held)

    def extra_repr(self) -> str:
        fmt = self.format
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bits={fmt.bits}",
            f"group_size={fmt.group_size}, symmetric={fmt.symmetric}, salient={fmt.num_salient}",
        ]
        if fmt.num_salient:
            parts[-1] += f" ({fmt.salient})"
        if fmt.rotation_size:
            parts.append(f"rotation={fmt.rotation_blocks}x{fmt.rotation_size}")
        return ", ".join([*parts, f"bias={'bias' in self.tensor_shapes}"])
