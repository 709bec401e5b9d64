"""Where nvcc is and how it is called. The kernels include no torch: the toolkit alone compiles them, without a GPU."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Code for each, and PTX of the last two for what comes later and between: code for 10.0 does not run on 11.0.
# 90a, not 90: Hopper's own instructions need the "a".
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
OLDEST = (12, 4)
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# A spilled register is a slow kernel, and a mistake in it: a warning for users of other compilers, an error in CI.
WARN_SPILLS = ["-Xptxas", "-warn-spills"]
FATAL_SPILLS = ["-Xptxas", "-warn-spills,-Werror"]
OR_CPU = "; ROSAQ_BUILD=cpu builds without CUDA"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its nvcc, the architectures to compile for ("80", "90a", ...), the folders of its headers and
    of its libraries, and which version it is."""

    nvcc: Path
    archs: tuple[str, ...]
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]
    version: str

    def compile_flags(self) -> list[str]:
        flags = list(FLAGS)
        for arch in self.archs:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        for arch in (arch.rstrip("af") for arch in self.archs[-2:]):
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
        if "90a" in self.archs:
            flags.append("-DROSAQ_BUILT_FOR_SM90A")
        # nvcc takes the first g++ of PATH, which the C++ sources need not be compiled with.
        named = shlex.split(os.environ.get("CXX", ""))
        if len(named) == 1 and "NVCC_CCBIN" not in os.environ:
            flags += ["-ccbin", named[0]]
        return flags + (FATAL_SPILLS if os.environ.get("ROSAQ_BUILD_STRICT") == "1" else WARN_SPILLS)

    def link_flags(self) -> list[str]:
        """The runtime is linked in: the library then loads where there is no CUDA at all."""
        for folder in self.libraries:
            if (folder / "libcudart_static.a").exists():
                return [str(folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
        places = ", ".join(map(str, self.libraries)) or "no folder"
        raise SystemExit(f"rosaq build: CUDA: {places}: no libcudart_static.a, need the whole toolkit{OR_CPU}")


def find_nvcc() -> Path | None:
    """nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in that order."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home, "bin", "nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if place.is_file()), None)


def find_toolkit() -> Toolkit | None:
    """The toolkit to build with, None if there is no nvcc. ROSAQ_CUDA_ARCHS="80;90a" replaces the list of targets.

    SystemExit for an nvcc that is too old, without headers, or does not know an architecture that was asked for; of the
    default list, those are left out.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    version = _version(nvcc)
    known = _known_archs(nvcc)
    asked = os.environ.get("ROSAQ_CUDA_ARCHS")
    archs = tuple(part.strip() for part in re.split("[;,]", asked) if part.strip()) if asked else DEFAULT_ARCHS
    missing = [arch for arch in archs if arch.rstrip("af") not in known]  # "a" variants are not listed
    if missing and asked:
        raise SystemExit(f"rosaq build: ROSAQ_CUDA_ARCHS: got {missing}, need some of {sorted(known)} ({nvcc})")
    archs = tuple(arch for arch in archs if arch.rstrip("af") in known)
    if not archs:
        raise SystemExit(f"rosaq build: nvcc: {nvcc} knows none of {DEFAULT_ARCHS}{OR_CPU}")
    return Toolkit(nvcc, archs, *_folders(nvcc), version)


def _folders(nvcc: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """(of headers, of libraries), as nvcc itself uses them: they lie elsewhere in every distribution, and nvcc may be a
    wrapper. Headers where the C++ compiler looks anyway are left out: named, they would come in the wrong order."""
    said = _ask(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    lines = {key: shlex.split(value) for key, value in re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", said, re.M)}
    found = {
        key: [Path(part.removeprefix(flag)).resolve() for part in lines.get(key, []) if part.startswith(flag)]
        for key, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L"))
    }
    system = [Path("/usr/include"), Path("/usr/local/include")]
    includes = [*found["INCLUDES"], *system]
    if not any((folder / "cuda_runtime_api.h").exists() for folder in includes):
        places = ", ".join(map(str, includes))
        raise SystemExit(f"rosaq build: CUDA: {places}: no cuda_runtime_api.h, need the whole toolkit{OR_CPU}")
    multiarch = Path(f"/usr/lib/{platform.machine()}-linux-gnu")
    return tuple(f for f in found["INCLUDES"] if f not in system), (*found["LIBRARIES"], multiarch)


def _version(nvcc: Path) -> str:
    said = _ask(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)(?:, (\S+))?", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        got = found[0] if found else repr(said.strip()[:80])
        raise SystemExit(f"rosaq build: nvcc: {nvcc}: got {got}, need CUDA {OLDEST[0]}.{OLDEST[1]} or newer{OR_CPU}")
    return found[0]


def _known_archs(nvcc: Path) -> set[str]:
    return set(re.findall(r"sm_(\w+)", _ask(nvcc, "--list-gpu-code")))


def _ask(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"rosaq build: nvcc: {nvcc} {shlex.join(arguments)} failed: {done.stderr.strip()}{OR_CPU}")
    return done.stdout + done.stderr
