"""Fixtures for all tests: a fixed seed before each, few threads, and the instruction sets of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from rosaq import _C


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def restore_isa() -> Iterator[None]:
    """Puts the instruction set back that was in use before the test."""
    before = _C.active_isa()
    yield
    _C.set_isa(before)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest, restore_isa: None) -> str:  # noqa: ARG001  (used for what it restores)
    """Runs the test once with each instruction set that this machine has."""
    _C.set_isa(request.param)
    return str(request.param)
