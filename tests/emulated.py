"""The CUDA ops on the emulator, with the signatures of `cases.Linear`: the same cases run there as on a device."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from cases import Linear
from torch import Tensor

from tests.emulator import driver

Options = driver.Options
FOLDER = "tests/emulator/kernels/fused"
SOURCES = [f"{FOLDER}/fused.cpp", *(f"{FOLDER}/instances_{d}_{b}bit.cpp" for d in ("f16", "bf16") for b in (3, 4))]
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
NUM_COUNTERS = 4096


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_uint32)]


class PanelLayout(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("num_panels", "groups", "zeros_offset", "codes_offset", "panel_bytes", "total_bytes")
    ]


class PackedWeight(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("symmetric", ctypes.c_bool),
        ("scale_dtype", ctypes.c_uint32),
        ("layout", PanelLayout),
    ]


class FusedGemmArgs(ctypes.Structure):
    """Structs of csrc/common/params.h; `library` compares the size."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("x", Buffer),
        ("weight", PackedWeight),
        ("r", ctypes.c_int64),
        ("salient_weight", Buffer),
        ("salient_index", ctypes.c_void_p),
        ("salient_basis", Buffer),
        ("rotation_size", ctypes.c_int64),
        ("rotation_blocks", ctypes.c_int64),
        ("rotation", Buffer),
        ("bias", Buffer),
        ("y", ctypes.c_void_p),
    ]


@lru_cache
def library(mode: str) -> driver.Library:
    """The kernels built for "plain" or "checked"."""
    made = driver.Library(driver.build("fused", SOURCES, mode))
    made.c.fused_sizeof_args.restype = made.c.fused_blob_bytes.restype = ctypes.c_int64
    assert made.c.fused_sizeof_args() == ctypes.sizeof(FusedGemmArgs)
    return made


def _weight(linear: Linear) -> PackedWeight:
    group_size = linear.k if linear.fmt.group_size == -1 else linear.fmt.group_size
    return PackedWeight(
        None, linear.n, linear.k, group_size, linear.fmt.bits, linear.zeros is None, DTYPES[linear.scales.dtype]
    )


class EmulatedLinear:
    """One linear of `cases`, packed by the CUDA kernels. mode: "plain" or "checked"."""

    def __init__(self, linear: Linear, mode: str = "plain", options: Options | None = None) -> None:
        self.linear, self.library, self.weight = linear, library(mode), _weight(linear)
        num_bytes = self.library.c.fused_blob_bytes(ctypes.byref(self.weight))
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
        with self.library.buffers() as buffers:
            blob = buffers.output("blob", torch.empty(num_bytes, dtype=torch.uint8))
            disk = [buffers.input("qweight", linear.qweight), buffers.input("scales", linear.scales)]
            disk.append(0 if linear.zeros is None else buffers.input("zeros", linear.zeros))
            self._call("fused_prepack", options, *disk, blob)
            self.blob = buffers.read(blob)

    def _call(self, function: str, options: Options | None, *args: object) -> None:
        self.library.call(function, options or Options(), ctypes.byref(self.weight), *args)

    def unprepack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """qweight, scales, zeros as the kernels rebuild them."""
        linear = self.linear
        with self.library.buffers() as buffers:
            out = [buffers.output("qweight", linear.qweight), buffers.output("scales", linear.scales)]
            out.append(0 if linear.zeros is None else buffers.output("zeros", linear.zeros))
            self._call("fused_unprepack", None, buffers.input("blob", self.blob), *out)
            read = [buffers.read(address) if address else None for address in out]
        return read[0], read[1], read[2]  # type: ignore[return-value]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [n, k] in dtype."""
        with self.library.buffers() as buffers:
            out = buffers.output("weight", torch.empty(self.linear.n, self.linear.k, dtype=dtype))
            self._call("fused_dequantize", None, buffers.input("blob", self.blob), int(dtype == torch.bfloat16), out)
            return buffers.read(out)

    def args(self, x: Tensor, buffers: driver.Buffers) -> FusedGemmArgs:
        """The arguments of a call on x [m, k], in guarded memory; y is uninitialised."""
        made = FusedGemmArgs()
        made.m, made.weight = x.numel() // self.linear.k, self.weight
        made.x = Buffer(buffers.input("x", x), DTYPES[x.dtype])
        made.y = buffers.output("y", torch.empty(made.m, self.linear.n, dtype=x.dtype))
        for name, tensor in self.linear.extras.items():
            if tensor is None:
                continue
            address = buffers.input(name, tensor)
            setattr(made, name, address if name == "salient_index" else Buffer(address, DTYPES[tensor.dtype]))
        if (weight := self.linear.extras["salient_weight"]) is not None:
            made.r = weight.size(1)
        if (rotation := self.linear.extras["rotation"]) is not None:
            made.rotation_blocks, made.rotation_size = rotation.size(0), rotation.size(1)
        return made

    def run(
        self, x: Tensor, options: Options | None = None, resident: int = 4, launches: int = 1, compute_major: int = 8
    ) -> Tensor:
        """fused_gemm of x; `resident` is how many blocks the device is said to hold, which decides how work is cut, and
        `compute_major` which kernel takes it.

        The counters must be zero again after every launch, but for the top bit of the barrier's.
        """
        with self.library.buffers() as buffers:
            args = self.args(x, buffers)
            blob, counters = buffers.input("blob", self.blob), buffers.inout("counters", self.counters)
            for _ in range(launches):
                self.library.call(
                    "fused_gemm", options or Options(), ctypes.byref(args), blob, counters, resident, compute_major
                )
            left = buffers.read(counters)
            assert not left[0] & 0x7FFFFFFF, f"the barrier's word is {left[0]} after the launch"
            assert not left[1:].any(), f"counters {left[1:].nonzero().flatten().tolist()} are not zero after the launch"
            return buffers.read(args.y).reshape(*x.shape[:-1], self.linear.n)


@lru_cache
def rounding_library(mode: str) -> driver.Library:
    return driver.Library(driver.build("rounding", ["tests/emulator/kernels/rounding.cpp"], mode))


def emulated_panel(op: str, args: tuple[Any, ...], options: Options, mode: str = "plain") -> tuple[Tensor, Tensor]:
    """What "round_panel" or "sweep_panel" makes of the arguments of that op on CUDA."""
    *tensors, bits = args
    library = rounding_library(mode)
    with library.buffers() as buffers:
        given = [buffers.input(f"argument {i}", tensor.contiguous()) for i, tensor in enumerate(tensors)]
        made = [buffers.output(name, torch.empty_like(tensors[0])) for name in ("codes", "passed")]
        library.call(op, options, *tensors[0].shape, bits, *given, *made)
        return buffers.read(made[0]), buffers.read(made[1])
