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

sys.path.insert(0, str(CSRC / "launch"))

import cuda  # noqa: E402
import find_torch  # noqa: E402
import generate_instances  # noqa: E402
import native  # noqa: E402

TORCH_INCLUDE = re.compile(r'#include [<"](torch|ATen|c10|pybind11)/')
RELATIVE_INCLUDE = re.compile(r'#include "(?:\.\./(\w+)/)?([\w.]+)"')
MAY_INCLUDE = {
    "common": {"common"},
    "device": {"common", "device"},
    "kernels": {"common", "device", "kernels"},
    "launch": {"common", "kernels", "launch"},
    "cpu": {"common", "cpu"},
    "torch": {"common", "cpu", "kernels", "launch", "torch"},
}


def sources() -> list[Path]:
    return sorted(path for suffix in ("h", "cuh", "cpp", "cu") for path in CSRC.rglob(f"*.{suffix}"))


def test_only_the_torch_folder_includes_torch() -> None:
    assert [str(p) for p in sources() if p.parent.name != "torch" and TORCH_INCLUDE.search(p.read_text())] == []


def test_folders_include_only_what_is_below_them() -> None:
    for path in sources():
        own = path.relative_to(CSRC).parts[0]
        for folder, _ in RELATIVE_INCLUDE.findall(path.read_text()):
            assert (folder or own) in MAY_INCLUDE[own], f"{path} includes from {folder}"


def test_what_the_host_compiles_sees_no_device_code() -> None:
    """kernels/ and launch/ hold headers for both: those that torch/ includes must not lead to a .cuh."""
    for path in sources():
        if path.suffix in (".h", ".cpp"):
            assert not re.search(r'#include ".*\.cuh"', path.read_text()), path


def test_only_launch_starts_kernels() -> None:
    assert [str(p) for p in sources() if "<<<" in p.read_text() and p.relative_to(CSRC).parts[0] != "launch"] == []


def test_every_source_is_built() -> None:
    listed = native.PORTABLE_SOURCES | native.X86_SOURCES | native.CUDA_SOURCES | native.NO_CUDA_SOURCES
    found = {str(p.relative_to(CSRC)) for p in [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")]}
    assert sorted(listed) == sorted(name for name in found if not re.match(r"launch/instances/.*\.cu", name))


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
    monkeypatch.setattr(native, "find_toolkit", lambda: None)
    for mode, reason in (("auto", "no nvcc on PATH or in CUDA_HOME"), ("cpu", "ROSAQ_BUILD=cpu")):
        monkeypatch.setenv("ROSAQ_BUILD", mode)
        assert native.choose_toolkit() is None
        assert capsys.readouterr().out == f"rosaq build: CPU kernels only ({reason})\n"
    monkeypatch.setenv("ROSAQ_BUILD", "cuda")
    with pytest.raises(SystemExit, match="got cuda, but no nvcc was found, need it on PATH or CUDA_HOME set"):
        native.choose_toolkit()
    monkeypatch.setenv("ROSAQ_BUILD", "gpu")
    with pytest.raises(SystemExit, match="got 'gpu', need auto, cpu or cuda"):
        native.choose_toolkit()


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of two architectures, laid out as some distributions do, without a compiler in it."""
    top = tmp_path / "cuda"
    made, include = top / "bin" / "nvcc", top / "targets" / "sbsa-linux" / "include"
    for folder in (made.parent, include, top / "lib"):
        folder.mkdir(parents=True)
    (include / "cuda_runtime_api.h").touch()
    pretend(made, top, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(top))
    return made


def pretend(nvcc: Path, top: Path, release: str, includes: str = "/targets/sbsa-linux/include") -> None:
    """Write an nvcc that tells about itself what the real one tells, and does nothing."""
    include = f"{top}/bin/..{includes}" if includes.startswith("/targets") else includes
    folders = f'#$ INCLUDES="-I{include}"\n#$ LIBRARIES=  "-L{top}/bin/../lib/stubs" "-L{top}/lib"'
    nvcc.write_text(f"""#!/bin/sh
case $1 in
    --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
    --list-gpu-code) echo sm_80 sm_90 ;;
    --dryrun) echo '{folders}' >&2 ;;
esac
""")
    nvcc.chmod(0o755)


def test_architectures_are_those_the_compiler_knows(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = cuda.find_toolkit()
    assert toolkit is not None
    assert (toolkit.nvcc, toolkit.archs) == (nvcc, ("80", "90a"))
    codes = [flag for flag in toolkit.compile_flags() if flag.startswith("arch=")]
    assert codes[-2:] == ["arch=compute_80,code=compute_80", "arch=compute_90,code=compute_90"]
    monkeypatch.setenv("ROSAQ_CUDA_ARCHS", "80;100")
    with pytest.raises(SystemExit, match=r"ROSAQ_CUDA_ARCHS: got \['100'\], need some of \['80', '90'\]"):
        cuda.find_toolkit()


def test_the_toolkit_is_where_nvcc_says(nvcc: Path) -> None:
    top = nvcc.parent.parent
    toolkit = cuda.find_toolkit()
    assert toolkit is not None
    assert toolkit.includes == (top / "targets" / "sbsa-linux" / "include",)
    with pytest.raises(SystemExit, match="no libcudart_static.a, need the whole toolkit; ROSAQ_BUILD=cpu builds"):
        toolkit.link_flags()
    (top / "lib" / "libcudart_static.a").touch()
    assert toolkit.link_flags()[0] == str(top / "lib" / "libcudart_static.a")
    pretend(nvcc, top, "12.4", includes="/nowhere")
    with pytest.raises(SystemExit, match=r"CUDA: /nowhere, /usr/include, .*no cuda_runtime_api.h"):
        cuda.find_toolkit()
    pretend(nvcc, top, "11.8")
    with pytest.raises(SystemExit, match=r"got release 11.8, V11.8.1, need CUDA 12.4 or newer; ROSAQ_BUILD=cpu"):
        cuda.find_toolkit()


@pytest.mark.usefixtures("nvcc")
def test_nvcc_is_told_the_compiler_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = cuda.find_toolkit()
    assert toolkit is not None
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    for named, flags in (("g++-13", ["-ccbin", "g++-13"]), ("ccache g++", []), ("", [])):
        monkeypatch.setenv("CXX", named)
        got = toolkit.compile_flags()
        assert got[got.index("-ccbin") :][:2] == flags if flags else "-ccbin" not in got


def test_instances_are_what_the_generator_writes() -> None:
    folder = generate_instances.FOLDER
    written = {p.name: p.read_text() for p in folder.iterdir() if not p.name.startswith(".")}
    assert written == generate_instances.files()
    kernels = [instance.kernel for instance in generate_instances.instances()]
    # What every architecture compiles, and what is empty on all but one.
    assert kernels.count("fused_gemm") <= 24
    assert kernels.count("warpgroup") <= 8
    assert len(set(kernels)) == 2


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
@pytest.mark.parametrize("name", ["portable", *(["avx2", "avx512", "avx512vnni"] if native.is_x86() else [])])
def test_no_function_of_the_cpu_kernels_is_shared_between_instruction_sets(name: str, tmp_path: Path) -> None:
    """Of a function that several objects define the linker keeps one copy: an older CPU may get that of AVX-512."""
    job, source = native.Build(CSRC, tmp_path, Path(torch.__file__).parent, ()), f"cpu/kernels_{name}.cpp"
    kind, flags = job.sources()[source]
    # Unoptimised: what the optimiser inlines today leaves no symbol, and it need not do so tomorrow.
    subprocess.run(job.compile_command(source, kind, [*flags, "-O0", "-w"]), check=True)
    command = ["nm", "-C", "--defined-only", str(job.object_of(source))]
    symbols = [line.split(maxsplit=2)[1:] for line in subprocess.check_output(command, text=True).splitlines()]
    assert "t" in [letter for letter, _ in symbols]  # functions of this object alone
    assert [symbol for letter, symbol in symbols if letter in "WTi"] == []  # seen by the linker


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_needs_no_cpp_symbol_of_torch() -> None:
    nm = subprocess.run(["nm", "-D", "--undefined-only", str(_C.__file__)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in nm.stdout.splitlines()]
    assert [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", s)] == []
    assert "torch_call_dispatcher" in symbols


def test_build_info_names_what_made_it() -> None:
    info = _C.build_info()
    assert info["cuda"] == bool(info["cuda_archs"])
    assert info["torch_target"] == "2.10"
    assert all(info[key] for key in ("compiler", "torch_headers", "layout_version"))


def test_missing_extension_says_how_to_build() -> None:
    code = "import sys; sys.modules['rosaq._C'] = None; import rosaq.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "rosaq._C (the compiled kernels) cannot be loaded: this is the source tree" in done.stderr


# Loaded by a process without rosaq: the same library name can be registered only once.
REFUSAL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.rosaq.unpack.default.redispatch(cuda, torch.zeros(8, 3, dtype=torch.int32), 3)
except RuntimeError as error:
    print(error)
"""


def test_a_build_without_nvcc_says_so_and_how_to_get_it(tmp_path: Path) -> None:
    job = native.Build(CSRC, tmp_path, Path(torch.__file__).parent, ())
    sources = ("torch/schema.cpp", "torch/bind_no_cuda.cpp")
    for source in sources:
        subprocess.run(job.compile_command(source, native.TORCH, []), check=True)
    output = tmp_path / "refusal.so"
    subprocess.run(job.link_command(output, sources), check=True)
    done = subprocess.run([sys.executable, "-c", REFUSAL, str(output)], capture_output=True, text=True, check=True)
    assert "rosaq::unpack: got CUDA tensors, but this build of rosaq has no CUDA kernels" in done.stdout
    assert "ROSAQ_BUILD=cuda pip install" in done.stdout
