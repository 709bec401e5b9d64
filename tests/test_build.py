"""The build: where torch is found, what is refused, who includes what, and that only the stable ABI is used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rosaq import _C

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC / "build_support"))

import find_torch  # noqa: E402
import native  # noqa: E402

TORCH_INCLUDE = re.compile(r'#include [<"](torch|ATen|c10|pybind11)/')
RELATIVE_INCLUDE = re.compile(r'#include "(?:\.\./(\w+)/)?([\w.]+)"')
MAY_INCLUDE = {
    "common": {"common"},
    "device": {"common", "device"},
    "cpu": {"common", "cpu"},
    "torch": {"common", "cpu", "torch"},
}


def sources() -> list[Path]:
    return sorted(path for suffix in ("h", "cuh", "cpp", "cu") for path in CSRC.rglob(f"*.{suffix}"))


def test_only_the_torch_folder_includes_torch() -> None:
    assert [str(p) for p in sources() if p.parent.name != "torch" and TORCH_INCLUDE.search(p.read_text())] == []


def test_folders_include_only_what_is_below_them() -> None:
    for path in sources():
        for folder, _ in RELATIVE_INCLUDE.findall(path.read_text()):
            assert (folder or path.parent.name) in MAY_INCLUDE[path.parent.name], f"{path} includes from {folder}"


def test_every_source_is_built() -> None:
    listed = native.PORTABLE_SOURCES | native.X86_SOURCES
    assert sorted(listed) == sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*.cpp"))


def test_torch_is_found_without_importing_it() -> None:
    found = find_torch.find_torch()
    assert found == Path(torch.__file__).parent
    assert find_torch.torch_version(found) == torch.__version__


def test_torch_dir_must_hold_a_new_enough_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSAQ_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="ROSAQ_TORCH_DIR: got .*need a torch package folder"):
        find_torch.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(SystemExit, match=r"torch: got 2.9.1\+cpu in .*need 2.10 or newer"):
        find_torch.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.10.0'\n")
    with pytest.raises(SystemExit, match=r"has no C\+\+ headers"):
        find_torch.find_torch()


def test_torch_is_required_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("backend", reason="needs setuptools in the environment")
    assert "torch>=2.10" not in backend.get_requires_for_build_wheel()
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert "torch>=2.10" in backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in backend.get_requires_for_build_editable()


def test_build_mode_is_honest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("auto", "cpu"):
        monkeypatch.setenv("ROSAQ_BUILD", mode)
        native.check_build_mode()
        assert capsys.readouterr().out == "rosaq build: CPU kernels only (this version has no CUDA kernels)\n"
    monkeypatch.setenv("ROSAQ_BUILD", "cuda")
    with pytest.raises(SystemExit, match="got cuda, but this version has no CUDA kernels"):
        native.check_build_mode()
    monkeypatch.setenv("ROSAQ_BUILD", "gpu")
    with pytest.raises(SystemExit, match="got 'gpu', need auto, cpu or cuda"):
        native.check_build_mode()


def test_a_bad_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"C\+\+ compiler: got no-such-compiler, need g\+\+"):
        native.compiler()
    monkeypatch.setenv("CXX", "false")
    job = native.Build(CSRC, tmp_path / "objects", Path(torch.__file__).parent, ())
    with pytest.raises(SystemExit, match=r"rosaq build: failed \(1\): false .*-c "):
        native.build(job, tmp_path / "out.so", jobs=1)
    assert not (tmp_path / "out.so").exists()


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_needs_no_cpp_symbol_of_torch() -> None:
    nm = subprocess.run(["nm", "-D", "--undefined-only", str(_C.__file__)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in nm.stdout.splitlines()]
    assert [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", s)] == []
    assert "torch_call_dispatcher" in symbols


def test_build_info_names_what_made_it() -> None:
    info = _C.build_info()
    assert info["cuda"] is False
    assert info["torch_target"] == "2.10"
    assert all(info[key] for key in ("compiler", "torch_headers", "layout_version"))


def test_missing_extension_says_how_to_build() -> None:
    code = "import sys; sys.modules['rosaq._C'] = None; import rosaq.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "rosaq._C (the compiled kernels) cannot be loaded; build it with `pip install .`" in done.stderr
