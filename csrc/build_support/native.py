"""Compiles csrc/ into rosaq/_C: which files, which flags, in parallel. Nothing here is torch's cpp_extension."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
PORTABLE_SOURCES: dict[str, tuple[str, list[str]]] = {
    "cpu/kernels_portable.cpp": (PLAIN, []),
    "cpu/gemm.cpp": (PLAIN, []),
    "cpu/isa.cpp": (PLAIN, []),
    "cpu/pack.cpp": (PLAIN, []),
    "torch/schema.cpp": (TORCH, []),
    "torch/bind_pack.cpp": (TORCH, []),
    "torch/bind_cpu.cpp": (TORCH, []),
    "torch/module.cpp": (TORCH, []),
}
X86_SOURCES: dict[str, tuple[str, list[str]]] = {
    "cpu/kernels_avx2.cpp": (PLAIN, AVX2_FLAGS),
    "cpu/kernels_avx512.cpp": (PLAIN, AVX512_FLAGS),
    "cpu/kernels_avx512vnni.cpp": (PLAIN, [*AVX512_FLAGS, "-mavx512vnni"]),
}


@dataclass(frozen=True)
class Build:
    """One build: where sources, torch and the Python headers are, and where objects go."""

    csrc: Path
    objects: Path
    torch_dir: Path
    include_dirs: tuple[Path, ...]

    def sources(self) -> dict[str, tuple[str, list[str]]]:
        return PORTABLE_SOURCES | (X86_SOURCES if is_x86() else {})

    def compile_command(self, source: str, kind: str, flags: list[str]) -> list[str]:
        includes = list(self.include_dirs) + ([self.torch_dir / "include"] if kind == TORCH else [])
        # Error messages quote source files: relative to the project or the include folder, not to this machine.
        defines = [f"-fmacro-prefix-map={folder}/=" for folder in (self.csrc.parent, *includes)]
        defines += ["-DROSAQ_X86"] if is_x86() else []
        command = [*compiler(), *COMMON_FLAGS, *defines, *flags, *(TORCH_FLAGS if kind == TORCH else [])]
        # torch's own headers are not ours to warn about.
        command += [part for folder in includes for part in ("-isystem", str(folder))]
        return [*command, "-c", str(self.csrc / source), "-o", str(self.object_of(source))]

    def object_of(self, source: str) -> Path:
        return self.objects / (source.replace("/", "_") + ".o")

    def link_command(self, output: Path) -> list[str]:
        objects = [str(self.object_of(source)) for source in self.sources()]
        # No rpath: `import torch` has loaded both libraries before _C. DT_NEEDED libtorch keeps its symbols in reach.
        libs = ["-L" + str(self.torch_dir / "lib"), "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
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


def check_build_mode() -> None:
    """Reads ROSAQ_BUILD=auto|cpu|cuda; says in one line what will be built."""
    mode = os.environ.get("ROSAQ_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"rosaq build: ROSAQ_BUILD: got {mode!r}, need auto, cpu or cuda")
    if mode == "cuda":
        raise SystemExit("rosaq build: ROSAQ_BUILD: got cuda, but this version has no CUDA kernels; need auto or cpu")
    print("rosaq build: CPU kernels only (this version has no CUDA kernels)", flush=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"rosaq build: failed ({result.returncode}): {shlex.join(command)}\n{result.stdout}{result.stderr}"
        )
    if result.stderr:
        print(result.stderr, flush=True)


def _newest(paths: list[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def build(job: Build, output: Path, jobs: int) -> None:
    """Compiles what is older than its source or any header, then links `output`."""
    job.objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    headers = _newest([*job.csrc.rglob("*.h"), Path(__file__)])
    stale = []
    for source, (kind, flags) in job.sources().items():
        made = job.object_of(source)
        newest = max(headers, (job.csrc / source).stat().st_mtime)
        if not made.exists() or made.stat().st_mtime < newest:
            stale.append(job.compile_command(source, kind, flags))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run, stale))
    # A process that has the old library mapped must keep it whole: link beside it, then rename over it.
    linked = output.with_suffix(".new")
    _run(job.link_command(linked))
    linked.replace(output)
