"""What a second build compiles: what was made of something else or in another way, and nothing more."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
sys.path.insert(0, str(CSRC / "build_support"))

import native  # noqa: E402

Again = Callable[[], list[str]]


def of_kinds(*kinds: str) -> list[str]:
    """The sources of some kinds, of a build without CUDA."""
    sources = native.Build(CSRC, CSRC, CSRC, ()).sources()
    return [source for source, (kind, _) in sources.items() if kind in kinds]


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    """Builds a copy of csrc/ once more, with a compiler that leaves empty objects; returns what was compiled."""
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    job = native.Build(tmp_path / "csrc", tmp_path / "objects", Path(torch.__file__).parent, ())
    compiled: list[str] = []

    def run(command: list[str]) -> None:
        Path(command[command.index("-o") + 1]).touch()
        if "-c" in command:
            compiled.append(str(Path(command[command.index("-c") + 1]).relative_to(job.csrc)))

    def build() -> list[str]:
        compiled.clear()
        native.build(job, tmp_path / "out" / "library.so", jobs=1)
        return compiled.copy()

    monkeypatch.setattr(native, "_run", run)
    assert build() == list(job.sources())
    assert build() == []
    return build


def test_another_version_of_a_tool(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "torch_version", lambda _folder: "99.0")
    assert again() == of_kinds(native.TORCH, native.PYTHON)


@pytest.mark.parametrize(
    ("name", "changed"), [("torch/checks.h", of_kinds(native.TORCH)), ("cpu/isa.cpp", ["cpu/isa.cpp"])]
)
def test_a_file_that_is_changed_and_then_put_back(name: str, changed: list[str], again: Again, tmp_path: Path) -> None:
    path, before = tmp_path / "csrc" / name, tmp_path / "before"
    shutil.copy2(path, before)
    path.write_text(path.read_text() + "// changed\n")
    assert again() == changed
    shutil.copy2(before, path)  # with its time, which is before that of the object
    assert again() == changed
    path.touch()
    assert again() == []


def test_half_an_object_of_a_compiler_that_was_killed(
    again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "csrc" / "cpu" / "isa.cpp", native._run
    before = path.read_text()

    def killed(command: list[str]) -> None:
        run(command)
        raise KeyboardInterrupt

    path.write_text(before + "// changed\n")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_run", killed)
        with pytest.raises(KeyboardInterrupt):
            again()
    path.write_text(before)  # what the object before was made of, and with the same command
    assert again() == ["cpu/isa.cpp"]
