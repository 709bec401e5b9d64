"""Rounding inside a panel on a real GPU: the bits of the CPU, by the kernels and by the loops over columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from panel_cases import ROUND, SIZES, SWEEP, make_panel
from torch import Tensor

from rosaq import _C, ops
from rosaq.quantizers.grid import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.build_info()["cuda"]),
        reason="needs a CUDA device, a torch that sees it, and a rosaq built with nvcc",
    ),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("p", "n"), [*SIZES, (128, 14336)])
def test_panels_have_the_bits_of_the_cpu(p: int, n: int, bits: int) -> None:
    panel = make_panel(p, n, bits)
    there = {name: t.to(DEVICE) for name, t in vars(panel).items() if isinstance(t, Tensor)}
    moved = replace(panel, **there, grid=Grid(*(t.to(DEVICE) for t in panel.grid)))
    assert ops.has_kernels(DEVICE)
    rounded, swept = ops.round_panel(*panel.round_args), ops.sweep_panel(*panel.sweep_args)
    for made in (ops.round_panel(*moved.round_args), moved.rounded()):
        assert all(torch.equal(got.cpu(), want) for got, want in zip(made, rounded, strict=True))
    for made in (ops.sweep_panel(*moved.sweep_args), moved.swept()):
        assert all(torch.equal(got.cpu(), want) for got, want in zip(made, swept, strict=True))


def test_panels_run_on_the_current_stream() -> None:
    panel = make_panel(128, 64)
    args = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in panel.round_args]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        args[0] = args[0] + 0  # what the op has to wait for
        made = ops.round_panel(*args)
    stream.synchronize()
    assert all(torch.equal(got.cpu(), want) for got, want in zip(made, panel.rounded(), strict=True))


@pytest.mark.parametrize(("op", "args"), [("round_panel", ROUND), ("sweep_panel", SWEEP)])
def test_tensors_of_two_devices_are_refused(op: str, args: dict[str, object]) -> None:
    for name, tensor in args.items():
        if isinstance(tensor, Tensor):
            with pytest.raises(RuntimeError, match=f"rosaq::{op}: "):
                getattr(ops, op)(**args | {name: tensor.to(DEVICE)})


def test_opcheck() -> None:
    args = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in make_panel(7, 20).round_args]
    torch.library.opcheck(torch.ops.rosaq.round_panel.default, args)
