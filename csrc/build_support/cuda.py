"""Where nvcc is and how it is called. The kernels include no torch: the toolkit alone compiles them, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Code for each, and PTX of the last for what comes later. 90a, not 90: Hopper's own instructions need the "a".
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# A spilled register is a slow kernel, and a mistake in it: a warning for users of other compilers, an error in CI.
WARN_SPILLS = ["-Xptxas", "-warn-spills"]
FATAL_SPILLS = ["-Xptxas", "-warn-spills,-Werror"]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its nvcc, its folder, and the architectures to compile for ("80", "90a", ...)."""

    nvcc: Path
    home: Path
    archs: tuple[str, ...]

    def compile_flags(self) -> list[str]:
        flags = list(FLAGS)
        for arch in self.archs:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        last = self.archs[-1].rstrip("a")
        flags += ["-gencode", f"arch=compute_{last},code=compute_{last}"]
        return flags + (FATAL_SPILLS if os.environ.get("ROSAQ_BUILD_STRICT") == "1" else WARN_SPILLS)

    def include_dir(self) -> Path:
        return self.home / "include"

    def link_flags(self) -> list[str]:
        """The runtime is linked in: the library then loads where there is no CUDA at all."""
        folders = [self.home / "lib64", self.home / "lib", self.home / "targets" / "x86_64-linux" / "lib"]
        found = [str(folder / "libcudart_static.a") for folder in folders if (folder / "libcudart_static.a").exists()]
        if not found:
            raise SystemExit(f"rosaq build: CUDA: {self.home} has no libcudart_static.a, need the whole toolkit")
        return [found[0], "-ldl", "-lrt", "-lpthread"]


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

    SystemExit for an architecture that was asked for and that this nvcc does not know; of the default list, those are
    left out.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    known = _known_archs(nvcc)
    asked = os.environ.get("ROSAQ_CUDA_ARCHS")
    archs = tuple(part.strip() for part in re.split("[;,]", asked) if part.strip()) if asked else DEFAULT_ARCHS
    missing = [arch for arch in archs if arch.rstrip("af") not in known]  # "a" variants are not listed
    if missing and asked:
        raise SystemExit(f"rosaq build: ROSAQ_CUDA_ARCHS: got {missing}, need some of {sorted(known)} ({nvcc})")
    archs = tuple(arch for arch in archs if arch.rstrip("af") in known)
    if not archs:
        raise SystemExit(f"rosaq build: nvcc: {nvcc} knows none of {DEFAULT_ARCHS}, need CUDA 12.4 or newer")
    return Toolkit(nvcc, _home_of(nvcc), archs)


def _home_of(nvcc: Path) -> Path:
    """The folder with include/ and lib64/, also where nvcc is a link or a wrapper that lies elsewhere."""
    for place in (nvcc.parent.parent, nvcc.resolve().parent.parent, Path("/usr/local/cuda")):
        if (place / "include" / "cuda_runtime_api.h").exists():
            return place
    raise SystemExit(f"rosaq build: CUDA: no include/cuda_runtime_api.h near {nvcc}, need CUDA_HOME set")


def _known_archs(nvcc: Path) -> set[str]:
    listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=False)
    found = set(re.findall(r"sm_(\w+)", listed.stdout))
    if listed.returncode != 0 or not found:
        raise SystemExit(f"rosaq build: nvcc: {nvcc} --list-gpu-code failed: {listed.stderr.strip()}")
    return found
