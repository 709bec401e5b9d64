"""What the CUDA side of the ops refuses, as far as that shows without a device: the kernel is called by its key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_linear, make_x

from rosaq import _C

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # type: ignore[attr-defined]


def call(op: str, *args: Any) -> Any:
    return getattr(torch.ops.rosaq, op).default.redispatch(CUDA, *args)


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels (no nvcc)")
def test_tensors_of_the_cpu_are_named() -> None:
    linear, x = make_linear(16, 64), make_x(2, 64, "float16")
    extras = linear.extras.values()
    with pytest.raises(RuntimeError, match="fused_gemm: x: got a tensor on the CPU, need it beside the CUDA tensors"):
        call("fused_gemm", x, linear.packed(), *extras, 16, 4, 32, True)
    with pytest.raises(RuntimeError, match="prepack: qweight: got a tensor on the CPU"):
        call("prepack", linear.qweight, linear.scales, None, 4)
    with pytest.raises(RuntimeError, match="round_panel: columns: got a tensor on the CPU"):
        call("round_panel", torch.zeros(4, 8), torch.eye(4), torch.ones(8), torch.zeros(8), 4)
    with pytest.raises(RuntimeError, match="sweep_panel: slope: got a tensor on the CPU"):
        call("sweep_panel", *[torch.zeros(4, 8)] * 2, torch.eye(4), *[torch.ones(4, 8)] * 2, 4)


@pytest.mark.parametrize("op", ["fused_gemm", "prepack", "unprepack", "pack", "unpack", "round_panel", "sweep_panel"])
def test_every_op_has_a_cuda_side(op: str) -> None:
    """Kernels where there was nvcc, else an error that says so."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rosaq::{op}", "CUDA")  # type: ignore[attr-defined]
