"""Builds kernels with the emulator into a shared library, and runs them from Python by ctypes.

    library = driver.Library(driver.build("mine", ["tests/emulator/kernels/mine.cpp"], "checked"))
    with library.buffers() as buffers:
        x = buffers.input("x", tensor)
        y = buffers.output("y", torch.empty(...))
        library.call("run_mine", driver.Options(seed=1), x, y, n)        # raises KernelError with file:line
        result = buffers.read(y)

A library is built once per content of what goes into it, and kept under build/emulator.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parent.parent
CACHE = ROOT / "build" / "emulator"
DIGEST_LENGTH = 16
KERNEL_FOLDERS = ("common", "device", "kernels", "launch")  # of csrc: what kernels may include
COMMON_FLAGS = ["-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
# Return addresses are how errors find their line, so calls must not become jumps nor branches be merged. Uninitialised
# locals hold 0xfe bytes: a NaN in 16 bits. Kernels reinterpret memory, as nvcc allows.
KERNEL_FLAGS = [
    "-DROSAQ_EMULATE",
    "-fno-optimize-sibling-calls",
    "-fno-tree-tail-merge",
    "-fno-crossjumping",
    "-fno-code-hoisting",
    "-ftrivial-auto-var-init=pattern",
    "-fno-strict-aliasing",
    "-Wno-unused-function",
    "-Wno-class-memaccess",
]
MODE_FLAGS = {
    "plain": ["-O1", "-fsanitize=alignment"],
    "checked": ["-O1", "-fsanitize=thread,alignment,bounds,shift", "-fno-threadsafe-statics"],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
}


class KernelError(Exception):
    """What the emulator found, with the file and line of the kernel."""


def compiler() -> str | None:
    """g++, or None: the checker's hooks are those of GCC."""
    return shutil.which(os.environ.get("EMULATOR_CXX", "g++"))


def cuda_include() -> Path | None:
    """The folder of cuda_fp16.h: beside nvcc, under CUDA_HOME, or from NVIDIA's packages. None: nowhere."""
    candidates = []
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.MULTILINE):
            candidates.append(Path(top[1]) / "include")
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    return next((path.resolve() for path in candidates if (path / "cuda_fp16.h").exists()), None)


def missing() -> str | None:
    """Why the emulator cannot be built here; None if it can."""
    if compiler() is None:
        return "the emulator needs g++, which is not installed"
    if cuda_include() is None:
        return "the emulator needs NVIDIA's headers (cuda_fp16.h): no nvcc, no CUDA_HOME, no package has them"
    return None


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"emulator build failed: {' '.join(command)}\n{done.stderr}")


def _compile(objects: Mapping[Path, Path], flags: Mapping[Path, Sequence[str]]) -> None:
    """Compiles each source to its object with its flags, as many at a time as there are cores."""
    commands = [[str(compiler()), *flags[s], "-x", "c++", "-c", str(s), "-o", str(o)] for s, o in objects.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))


def _digest(paths: Iterable[Path], flags: Sequence[str]) -> str:
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(version + repr(list(flags)).encode())
    for path in sorted(paths):
        state.update(str(path).encode() + path.read_bytes())
    return state.hexdigest()[:DIGEST_LENGTH]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def _emulator_objects(asan: bool) -> list[Path]:
    """The emulator itself, compiled without hooks: it is not what is being checked. ASan has to know of the stacks."""
    flags = [*COMMON_FLAGS, "-O3", *_include_flags()]
    sources = dict.fromkeys(sorted(EMULATOR.glob("*.cpp")), flags)
    if asan:
        sources |= {EMULATOR / name: [*flags, *MODE_FLAGS["asan"]] for name in ("fiber.cpp", "faults.cpp")}
    digest = _digest([*sources, *EMULATOR.glob("*.h"), ROOT / "csrc/common/half.h"], [str(sources)])
    name = "objects-asan" if asan else "objects"
    folder = CACHE / f"{name}-{digest}"
    with _locked(name):
        if not folder.exists():
            for old in CACHE.glob(f"{name}-" + "[0-9a-f]" * DIGEST_LENGTH):
                shutil.rmtree(old)
            new = CACHE / f"{name}.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _compile({path: new / f"{path.stem}.o" for path in sources}, sources)
            new.rename(folder)
    return sorted(folder.glob("*.o"))


def _include_flags() -> list[str]:
    return [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}", "-isystem", str(cuda_include())]


def build(name: str, sources: Sequence[str], mode: str = "plain", flags: Sequence[str] = ()) -> Path:
    """Compiles kernel sources (paths relative to the repository) with the emulator.

    mode: "plain" or "checked" make a shared library; "asan" makes a program, so the sources need a main().
    """
    objects = _emulator_objects(asan=mode == "asan")
    paths = [ROOT / source for source in sources]
    flags = [*COMMON_FLAGS, *KERNEL_FLAGS, *MODE_FLAGS[mode], *_include_flags(), *flags]
    folders = {*(ROOT / "csrc" / name for name in KERNEL_FOLDERS), EMULATOR, *(path.parent for path in paths)}
    headers = {header for folder in folders for header in _sources(folder, ".h", ".cuh")}
    digest = _digest([*paths, *headers, *objects], flags)
    target = CACHE / f"{name}-{mode}-{digest}{'' if mode == 'asan' else '.so'}"
    with _locked(f"{name}-{mode}"):
        if not target.exists():
            for old in CACHE.glob(f"{name}-{mode}-" + "[0-9a-f]" * DIGEST_LENGTH + "*"):
                old.unlink()
            new = {path: CACHE / f"{name}-{mode}.{i}.o" for i, path in enumerate(paths)}
            _compile(new, dict.fromkeys(paths, flags))
            # No -fsanitize for a library: the hooks are the emulator's own, and no sanitizer's library is wanted.
            kind = ["-fsanitize=address,undefined"] if mode == "asan" else ["-shared", "-Wl,-z,defs"]
            linked = target.with_suffix(".new")
            _run([str(compiler()), *kind, *map(str, [*new.values(), *objects]), "-o", str(linked), "-ldl"])
            for path in new.values():
                path.unlink()
            linked.rename(target)
    return target


class Options(ctypes.Structure):
    """emu::LaunchOptions."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("completion", ctypes.c_int),
        ("resident_blocks", ctypes.c_int),
        ("shuffle_blocks", ctypes.c_bool),
    ]
    COMPLETIONS = ("eager", "lazy", "random")

    def __init__(
        self, seed: int = 0, completion: str = "random", resident_blocks: int = 4, shuffle_blocks: bool = False
    ) -> None:
        super().__init__(seed, self.COMPLETIONS.index(completion), resident_blocks, shuffle_blocks)


class Buffers:
    """Guarded device memory, freed at the end of the `with` block. Addresses are what kernels get."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._tensors: dict[int, Tensor] = {}

    def _allocate(self, name: str, like: Tensor, access: int) -> int:
        address = self._library.c.emu_allocate(like.nbytes, name.encode(), access)
        if not address:
            raise KernelError(self._library.last_error())
        self._tensors[address] = like.contiguous()
        return int(address)

    def _write(self, address: int) -> int:
        tensor = self._tensors[address]
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return address

    def input(self, name: str, tensor: Tensor) -> int:
        """Memory with the tensor's bytes, that kernels may only read."""
        return self._write(self._allocate(name, tensor, 0))

    def output(self, name: str, like: Tensor) -> int:
        """Memory of the tensor's size that is uninitialised (NaN) until the kernel writes it."""
        return self._allocate(name, like, 1)

    def inout(self, name: str, tensor: Tensor) -> int:
        """Memory with the tensor's bytes, that kernels may read and write."""
        return self._write(self._allocate(name, tensor, 2))

    def read(self, address: int) -> Tensor:
        """What is there now, as a tensor of the shape and dtype of the one it was made for."""
        result = torch.empty_like(self._tensors[address])
        ctypes.memmove(result.data_ptr(), address, result.nbytes)
        return result

    def free(self) -> None:
        for address in self._tensors:
            self._library.c.emu_free(ctypes.c_void_p(address))
        self._tensors.clear()


class Library:
    """A library made by `build`."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.emu_allocate.restype = ctypes.c_void_p
        self.c.emu_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
        self.c.emu_last_error.restype = ctypes.c_char_p

    def last_error(self) -> str:
        return str(self.c.emu_last_error().decode())

    @contextmanager
    def buffers(self) -> Iterator[Buffers]:
        made = Buffers(self)
        try:
            yield made
        finally:
            made.free()

    def call(self, function: str, options: Options, *args: object) -> None:
        """Calls int function(const LaunchOptions*, ...); ints that are addresses go as 64 bits.

        Raises KernelError if it returns anything but 0.
        """
        converted = [ctypes.c_int64(arg) if isinstance(arg, int) else arg for arg in args]
        if getattr(self.c, function)(ctypes.byref(options), *converted) != 0:
            raise KernelError(self.last_error())
