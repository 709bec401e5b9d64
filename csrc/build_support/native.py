"""Compiles csrc/ into rosaq/_C: which files, which flags, in parallel. Nothing here is torch's cpp_extension."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda import Toolkit, find_toolkit
from find_torch import torch_version

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# No silent fused multiply-add: the integer kernels promise the same bits on every instruction set.
COMMON_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10: loads under every torch from there on

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
# g++ 12 reports its own intrinsic headers (_mm512_undefined) as uninitialised.
AVX512_FLAGS = [
    *AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
]

PLAIN = "plain"  # no torch headers
TORCH = "torch"
PYTHON = "python"  # torch, Python and pybind11, whose place changes with every isolated build
NVCC = "nvcc"  # CUDA kernels
PORTABLE_SOURCES: dict[str, tuple[str, list[str]]] = {
    "cpu/kernels_portable.cpp": (PLAIN, []),
    "cpu/gemm.cpp": (PLAIN, []),
    "cpu/isa.cpp": (PLAIN, []),
    "cpu/pack.cpp": (PLAIN, []),
    "torch/schema.cpp": (TORCH, []),
    "torch/fused_args.cpp": (TORCH, []),
    "torch/pack_args.cpp": (TORCH, []),
    "torch/rounding_args.cpp": (TORCH, []),
    "torch/bind_pack.cpp": (TORCH, []),
    "torch/bind_rounding.cpp": (TORCH, []),
    "torch/bind_cpu.cpp": (TORCH, []),
    "torch/module.cpp": (PYTHON, []),
}
X86_SOURCES: dict[str, tuple[str, list[str]]] = {
    "cpu/kernels_avx2.cpp": (PLAIN, AVX2_FLAGS),
    "cpu/kernels_avx512.cpp": (PLAIN, AVX512_FLAGS),
    "cpu/kernels_avx512vnni.cpp": (PLAIN, [*AVX512_FLAGS, "-mavx512vnni"]),
}
CUDA_SOURCES: dict[str, tuple[str, list[str]]] = {
    "launch/repack.cu": (NVCC, []),
    "launch/dense.cu": (NVCC, []),
    "launch/rounding.cu": (NVCC, []),
    "launch/instances/table.cpp": (PLAIN, []),
    "torch/bind_cuda.cpp": (TORCH, []),
    "torch/bind_pack_cuda.cpp": (TORCH, []),
    "torch/bind_rounding_cuda.cpp": (TORCH, []),
    "torch/cuda_context.cpp": (TORCH, []),
    "torch/cuda_weight.cpp": (TORCH, []),
    "torch/many_tokens.cpp": (TORCH, []),
}
NO_CUDA_SOURCES: dict[str, tuple[str, list[str]]] = {"torch/bind_no_cuda.cpp": (TORCH, [])}
# What an object may depend on, by the kind of its source: a change of the CPU backend recompiles no CUDA kernel.
HEADER_FOLDERS = {
    PLAIN: ("common", "cpu", "kernels", "launch"),
    TORCH: ("common", "cpu", "kernels", "launch", "torch"),
    PYTHON: ("common", "cpu", "launch"),
    NVCC: ("common", "device", "kernels", "launch"),
}


@dataclass(frozen=True)
class Build:
    """One build: where sources, torch and the Python headers are, where objects go, and the CUDA toolkit if any."""

    csrc: Path
    objects: Path
    torch_dir: Path
    include_dirs: tuple[Path, ...]
    toolkit: Toolkit | None = None

    def sources(self) -> dict[str, tuple[str, list[str]]]:
        """The slowest first, so that the last to compile is a short one."""
        cuda = NO_CUDA_SOURCES
        if self.toolkit is not None:
            instances = sorted(path.name for path in (self.csrc / "launch" / "instances").glob("*.cu"))
            cuda = {f"launch/instances/{name}": (NVCC, []) for name in instances} | CUDA_SOURCES
        return cuda | PORTABLE_SOURCES | (X86_SOURCES if is_x86() else {})

    def compile_command(self, source: str, kind: str, flags: list[str]) -> list[str]:
        target = ["-c", str(self.csrc / source), "-o", str(self.object_of(source))]
        if kind == NVCC:
            assert self.toolkit is not None
            return [str(self.toolkit.nvcc), *self.toolkit.compile_flags(), *flags, *target]
        needs_torch = kind in (TORCH, PYTHON)
        includes = list(self.include_dirs) if kind == PYTHON else []
        includes += [self.torch_dir / "include"] if needs_torch else []
        includes += self.toolkit.includes if self.toolkit is not None else []
        # Error messages quote source files: relative to the project or the include folder, not to this machine.
        defines = [f"-fmacro-prefix-map={folder}/=" for folder in (self.csrc.parent, *includes)]
        defines += ["-DROSAQ_X86"] if is_x86() else []
        if self.toolkit is not None:
            defines += [f'-DROSAQ_CUDA_ARCHS="{" ".join(self.toolkit.archs)}"']
        command = [*compiler(), *COMMON_FLAGS, *defines, *flags, *(TORCH_FLAGS if needs_torch else [])]
        # torch's own headers are not ours to warn about.
        command += [part for folder in includes for part in ("-isystem", str(folder))]
        return [*command, *target]

    def object_of(self, source: str) -> Path:
        return self.objects / (source.replace("/", "_") + ".o")

    def link_command(self, output: Path, sources: Iterable[str] | None = None) -> list[str]:
        """The library of all sources, or of some."""
        objects = [str(self.object_of(source)) for source in (self.sources() if sources is None else sources)]
        # No rpath: `import torch` has loaded both libraries before _C. DT_NEEDED libtorch keeps its symbols in reach.
        libs = ["-L" + str(self.torch_dir / "lib"), "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
        # Where the linker takes the C++ library as an archive, its symbols must not meet those of the shared one: the
        # text of an error, put together by half of each, was a segmentation fault.
        libs += ["-Wl,--exclude-libs,ALL"]
        libs += self.toolkit.link_flags() if self.toolkit is not None else []
        return [*compiler(), "-shared", *objects, *libs, "-o", str(output)]


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else g++, else clang++."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++"]:
        parts = shlex.split(command)
        if parts and shutil.which(parts[0]):
            return parts
    raise SystemExit(
        f"rosaq build: C++ compiler: got {named or 'neither g++ nor clang++'}, need g++ 11 or newer (set CXX)"
    )


def choose_toolkit() -> Toolkit | None:
    """The CUDA toolkit for this build by ROSAQ_BUILD=auto|cpu|cuda; says in one line what will be built."""
    mode = os.environ.get("ROSAQ_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"rosaq build: ROSAQ_BUILD: got {mode!r}, need auto, cpu or cuda")
    toolkit = None if mode == "cpu" else find_toolkit()
    if mode == "cuda" and toolkit is None:
        raise SystemExit("rosaq build: ROSAQ_BUILD: got cuda, but no nvcc was found, need it on PATH or CUDA_HOME set")
    if toolkit is None:
        reason = "ROSAQ_BUILD=cpu" if mode == "cpu" else "no nvcc on PATH or in CUDA_HOME"
        print(f"rosaq build: CPU kernels only ({reason})", flush=True)
    else:
        print(f"rosaq build: CPU and CUDA kernels (sm_{', sm_'.join(toolkit.archs)}; {toolkit.nvcc})", flush=True)
    return toolkit


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"rosaq build: failed ({result.returncode}): {shlex.join(command)}\n{result.stdout}{result.stderr}"
        )
    if result.stderr:
        print(result.stderr, flush=True)


def _headers(csrc: Path, kind: str) -> list[Path]:
    folders = [csrc / name for name in HEADER_FOLDERS[kind]]
    return [path for folder in folders for suffix in ("h", "cuh") for path in folder.glob(f"*.{suffix}")]


def _digest(csrc: Path, paths: list[Path]) -> str:
    """Of names and contents: a file that was put back is older than what was made of its successor."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(csrc)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Job:
    """An object to make; record: the command, what it reads, and the versions of what it uses."""

    made: Path
    command: list[str]
    record: str

    @property
    def recorded(self) -> Path:
        return self.made.with_suffix(".command")

    def is_stale(self) -> bool:
        """True where an object is missing, was not finished, or was made of something else or in another way."""
        return not (self.made.exists() and self.recorded.exists() and self.recorded.read_text() == self.record)

    def run(self) -> None:
        self.recorded.unlink(missing_ok=True)  # a compiler that is killed leaves half an object
        _run(self.command)
        self.recorded.write_text(self.record)


def _versions(job: Build) -> dict[str, str]:
    """{kind of source: versions of what compiles it and of what it includes}."""
    asked = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False)
    host = asked.stdout.partition("\n")[0]
    cuda = "" if job.toolkit is None else job.toolkit.version
    torch = torch_version(job.torch_dir)
    return {PLAIN: f"{host} {cuda}", NVCC: f"{host} {cuda}", **dict.fromkeys((TORCH, PYTHON), f"{host} {cuda} {torch}")}


def build(job: Build, output: Path, jobs: int) -> None:
    """Compiles what was made of another source or header, then links `output`."""
    job.objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    versions = _versions(job)
    headers = {kind: _digest(job.csrc, _headers(job.csrc, kind)) for kind in HEADER_FOLDERS}
    needed = []
    for source, (kind, flags) in job.sources().items():
        command = job.compile_command(source, kind, flags)
        # Read before the compiler does: what changes meanwhile does not match what is recorded here.
        read = f"{_digest(job.csrc, [job.csrc / source])} {headers[kind]}"
        needed.append(_Job(job.object_of(source), command, f"{shlex.join(command)}\n{versions[kind]}\n{read}\n"))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_Job.run, filter(_Job.is_stale, needed)))
    # A process that has the old library mapped must keep it whole: link beside it, then rename over it.
    linked = output.with_suffix(".new")
    _run(job.link_command(linked))
    linked.replace(output)
