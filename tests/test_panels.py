"""Rounding inside a panel: the ops against float64 and, bit for bit, against the loops over columns they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import Options, emulated_panel
from panel_cases import ROUND, SIZES, SWEEP, check_rounded, check_swept, make_panel
from torch import Tensor

from rosaq import ops
from rosaq.quantizers import panels
from rosaq.quantizers.grid import Grid
from tests.emulator import driver

needs_emulator = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("p", "n"), SIZES)
def test_panels_are_right_and_have_the_bits_of_the_loop(p: int, n: int, bits: int) -> None:
    panel = make_panel(p, n, bits)
    given = [t.clone() for t in (panel.columns, panel.codes)]
    codes, errors = ops.round_panel(*panel.round_args)
    check_rounded(panel, codes, errors)
    assert all(map(torch.equal, (codes, errors), panel.rounded()))
    codes, moves = ops.sweep_panel(*panel.sweep_args)
    check_swept(panel, codes, moves)
    assert all(map(torch.equal, (codes, moves), panel.swept()))
    assert all(map(torch.equal, given, (panel.columns, panel.codes)))


@pytest.mark.parametrize(("p", "n"), SIZES[::3])
def test_panels_have_the_same_bits_on_every_isa(p: int, n: int, isa: str) -> None:  # noqa: ARG001
    panel = make_panel(p, n)
    assert all(map(torch.equal, ops.round_panel(*panel.round_args), panel.rounded()))
    assert all(map(torch.equal, ops.sweep_panel(*panel.sweep_args), panel.swept()))


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("_restored_threads")
def test_panels_have_the_same_bits_for_any_number_of_threads() -> None:
    panel = make_panel(33, 300)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, ops.round_panel(*panel.round_args), panel.rounded()))
        assert all(map(torch.equal, ops.sweep_panel(*panel.sweep_args), panel.swept()))


def test_ties_go_to_the_even_code_and_ends_hold() -> None:
    columns = torch.tensor([[0.5, 1.5, 2.5, -9.0, 1e30, -1e30, float("inf"), float("nan")]])
    codes, errors = ops.round_panel(columns, torch.ones(1, 1), torch.ones(8), torch.zeros(8), 3)
    assert codes[0, :7].tolist() == [0, 2, 2, 0, 7, 0, 7]
    assert errors[0, :4].tolist() == [0.5, -0.5, 0.5, -9.0]
    assert codes[0, 7].isnan()


def test_arguments_need_not_be_contiguous() -> None:
    panel = make_panel(16, 40)
    columns, factor, scale, zero, bits = panel.round_args
    turned = (columns.T.contiguous().T, factor.T.contiguous().T, scale.repeat_interleave(2)[::2], zero, bits)
    results = ops.round_panel(*turned)
    assert all(map(torch.equal, results, panel.rounded()))
    assert all(t.is_contiguous() for t in results)


def test_no_rows_are_no_work() -> None:
    assert [t.shape for t in ops.round_panel(*make_panel(7, 0).round_args)] == [(7, 0), (7, 0)]


def test_the_loop_runs_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = make_panel(7, 8)
    columns, factor, scale, zero, bits = panel.round_args
    monkeypatch.setattr(ops, "has_kernels", lambda _: False)
    monkeypatch.setattr(ops, "round_panel", None)
    monkeypatch.setattr(ops, "sweep_panel", None)
    assert all(map(torch.equal, panels.round_panel(columns, factor, Grid(scale, zero), bits), panel.rounded()))
    swept = panels.sweep_panel(columns, panel.codes, panel.gram, panel.grid, bits)
    assert all(map(torch.equal, swept, panel.swept()))


def test_only_devices_with_kernels_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.has_kernels(torch.device("cpu"))
    assert not ops.has_kernels(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    for built in (False, True):
        monkeypatch.setattr(ops._C, "build_info", lambda built=built: {"cuda": built})
        assert not ops.has_kernels(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert ops.has_kernels(torch.device("cuda", 0))


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "round_panel",
        {"columns": torch.zeros(129, 8)},
        r"columns: got shape \[129, 8\], need \[p, n\] with p from 1 to 128",
    ),
    ("round_panel", {"columns": torch.zeros(0, 8)}, r"columns: got shape \[0, 8\], need \[p, n\] with p from 1 to 128"),
    ("round_panel", {"columns": torch.zeros(8)}, r"columns: got shape \[8\], need \[p, n\] with p from 1 to 128"),
    ("round_panel", {"columns": torch.zeros(4, 8).double()}, "columns: got dtype Double, need Float"),
    ("round_panel", {"factor": torch.zeros(4, 5)}, r"factor: got shape \[4, 5\], need \[4, 4\]"),
    ("round_panel", {"factor": torch.eye(4).half()}, "factor: got dtype Half, need Float"),
    ("round_panel", {"scale": torch.ones(4, 8)}, r"scale: got shape \[4, 8\], need \[8\]"),
    ("round_panel", {"zero": torch.zeros(8, dtype=torch.uint8)}, "zero: got dtype Byte, need Float"),
    ("round_panel", {"bits": 2}, "bits: got 2, need 3 or 4"),
    ("sweep_panel", {"slope": torch.zeros(129, 8)}, r"slope: got shape \[129, 8\], need \[p, n\] with p from 1 to 128"),
    ("sweep_panel", {"codes": torch.zeros(4, 9)}, r"codes: got shape \[4, 9\], need \[4, 8\]"),
    ("sweep_panel", {"codes": torch.zeros(4, 8).int()}, "codes: got dtype Int, need Float"),
    ("sweep_panel", {"gram": torch.eye(5)}, r"gram: got shape \[5, 5\], need \[4, 4\]"),
    ("sweep_panel", {"scale": torch.ones(8)}, r"scale: got shape \[8\], need \[4, 8\]"),
    ("sweep_panel", {"zero": torch.zeros(4, 1)}, r"zero: got shape \[4, 1\], need \[4, 8\]"),
    ("sweep_panel", {"bits": 5}, "bits: got 5, need 3 or 4"),
]


@pytest.mark.parametrize(("op", "changes", "message"), REFUSALS, ids=[f"{op} {m[:24]}" for op, _, m in REFUSALS])
def test_ops_and_fakes_refuse(op: str, changes: dict[str, Any], message: str) -> None:
    args = (ROUND if op == "round_panel" else SWEEP) | changes
    with pytest.raises(RuntimeError, match=f"rosaq::{op}: {message}"):
        getattr(ops, op)(**args)
    on_meta = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in args.items()}
    with pytest.raises(RuntimeError, match=f"rosaq::{op}: {next(iter(changes))}: got"):
        getattr(ops, op)(**on_meta)


def test_opcheck() -> None:
    panel = make_panel(7, 20)
    torch.library.opcheck(torch.ops.rosaq.round_panel.default, panel.round_args)
    torch.library.opcheck(torch.ops.rosaq.sweep_panel.default, panel.sweep_args)


@needs_emulator
@pytest.mark.parametrize(("p", "n"), [(1, 1), (7, 100), (16, 64), (33, 8), (128, 65)])
def test_the_cuda_kernels_have_the_bits_of_the_cpu(p: int, n: int) -> None:
    panel = make_panel(p, n, bits=4)
    for seed in range(2):
        assert all(
            map(torch.equal, emulated_panel("round_panel", panel.round_args, Options(seed=seed)), panel.rounded())
        )
        assert all(map(torch.equal, emulated_panel("sweep_panel", panel.sweep_args, Options(seed=seed)), panel.swept()))


@needs_emulator
@pytest.mark.parametrize(("p", "n"), [(1, 1), (33, 100), (128, 64)])
def test_the_cuda_kernels_have_no_race_and_stay_in_bounds(p: int, n: int) -> None:
    panel = make_panel(p, n)
    check_rounded(panel, *emulated_panel("round_panel", panel.round_args, Options(seed=1), "checked"))
    check_swept(panel, *emulated_panel("sweep_panel", panel.sweep_args, Options(seed=1), "checked"))
