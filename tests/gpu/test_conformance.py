"""Every wrapper of csrc/device/ptx*.cuh: emulator, GPU and the numpy model of conformance.py must agree.

The GPU's outputs are kept in golden/, so that machines without one hold the emulator against real hardware too. They
are written by the first run on a GPU and have to be committed.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import driver
from tests.gpu.conformance import CASES, Words
from tests.tolerances import assert_mma_close

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GOLDEN = HERE / "golden"
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC / "build_support"))

import cuda  # noqa: E402

needs_emulator = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.find_nvcc() is None,
    reason="needs a CUDA device, a torch that sees it, and nvcc",
)


def agree(case: str, got: Words, want: Words) -> None:
    if CASES[case].is_exact:
        wrong = np.flatnonzero(got != want)
        assert wrong.size == 0, (
            f"{wrong.size} words differ, the first at {wrong[0]}: {got[wrong[0]]:#x}, want {want[wrong[0]]:#x}"
        )
    else:
        assert_mma_close(*(torch.from_numpy(w.view(np.float32).copy()) for w in (got, want)))


@pytest.fixture(scope="module")
def emulator() -> driver.Library:
    return driver.Library(driver.build("conformance", ["tests/gpu/conformance_emulated.cpp"], "checked"))


def emulate(emulator: driver.Library, case: str, given: Words, size: int, options: driver.Options) -> Words:
    with emulator.buffers() as buffers:
        x = buffers.input("in", torch.from_numpy(given.view(np.int32).copy()))
        y = buffers.inout("out", torch.zeros(size, dtype=torch.int32))
        emulator.call("conformance_run", options, case.encode(), x, y)
        return buffers.read(y).numpy().view(np.uint32)


@needs_emulator
@pytest.mark.parametrize("completion", driver.Options.COMPLETIONS)
@pytest.mark.parametrize("case", CASES)
def test_emulator_does_what_the_isa_says(emulator: driver.Library, case: str, completion: str) -> None:
    given, want = CASES[case].make(case)
    for seed in range(3):
        agree(case, emulate(emulator, case, given, want.size, driver.Options(seed, completion)), want)


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_emulator_does_what_a_gpu_did(emulator: driver.Library, case: str) -> None:
    if not (GOLDEN / f"{case}.npz").exists():
        pytest.skip(
            "GOLDEN VECTORS ARE MISSING: no GPU has run these yet. Run this file on one, commit tests/gpu/golden"
        )
    golden = np.load(GOLDEN / f"{case}.npz")
    got = emulate(emulator, case, golden["given"], golden["out"].size, driver.Options())
    agree(case, got, golden["out"])


def build_for_gpu(arch: str) -> Path:
    """The cases as a library for `arch` ("sm_80", "native"), built once for each state of the sources."""
    sources = [HERE / "conformance.cu", HERE / "conformance_kernels.cuh", *CSRC.glob("device/*.*")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    library = ROOT / "build" / "conformance" / f"{arch}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [str(cuda.find_nvcc()), *cuda.FLAGS, f"-arch={arch}", "-shared", f"-I{CSRC}", str(sources[0])]
        subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_cases_compile_for_a_gpu(arch: str) -> None:
    assert hasattr(ctypes.CDLL(str(build_for_gpu(arch))), "conformance_run")


@pytest.fixture(scope="module")
def gpu() -> ctypes.CDLL:
    # nvcc's "native" is sm_90 on Hopper, without the instructions of sm_90a.
    arch = "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "native"
    loaded = ctypes.CDLL(str(build_for_gpu(arch)))
    loaded.conformance_error.restype = ctypes.c_char_p
    return loaded


def on_gpu(gpu: ctypes.CDLL, case: str, given: Words, size: int) -> Words:
    out = np.zeros(size, np.uint32)
    given = np.ascontiguousarray(given)
    sizes = [ctypes.c_size_t(given.size), ctypes.c_size_t(size)]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (given, out)]
    failed = gpu.conformance_run(case.encode(), pointers[0], sizes[0], pointers[1], sizes[1])
    assert not failed, gpu.conformance_error().decode()
    return out


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_does_what_the_isa_says(gpu: ctypes.CDLL, case: str) -> None:
    major, minor = torch.cuda.get_device_capability()
    sm, needs = 10 * major + minor, CASES[case].needs_sm
    if sm < needs or (CASES[case].only_sm and sm != needs):
        pytest.skip(f"needs sm_{needs}, this device is sm_{sm}")
    given, want = CASES[case].make(case)
    got = on_gpu(gpu, case, given, want.size)
    agree(case, got, want)
    golden = GOLDEN / f"{case}.npz"
    if golden.exists():
        kept = np.load(golden)
        agree(case, on_gpu(gpu, case, kept["given"], kept["out"].size), kept["out"])
    else:
        GOLDEN.mkdir(exist_ok=True)
        np.savez(golden, given=given, out=got, device=np.array(torch.cuda.get_device_name()))
        warnings.warn(f"wrote {golden.relative_to(ROOT)}: commit it", stacklevel=1)


def test_every_wrapper_is_covered() -> None:
    text = "".join((CSRC / "device" / name).read_text() for name in ("ptx.cuh", "ptx_wgmma.cuh"))
    wrappers = set(re.findall(r"ROSAQ_DEVICE\s+[\w:]+\s+(\w+)(?:<\w+>)?\(", text))
    covered = {name for case in CASES.values() for name in case.covers}
    assert "smem_address" in wrappers  # the search finds something
    # An address and a descriptor, not instructions; and what keeps nvcc from moving things, but emits nothing.
    assert wrappers - covered == {"smem_address", "bits", "settle"}


def test_every_case_has_a_kernel() -> None:
    kernels = re.findall(r'^    \{"(\w+)", ', (HERE / "conformance_kernels.cuh").read_text(), re.MULTILINE)
    assert kernels == list(CASES)
