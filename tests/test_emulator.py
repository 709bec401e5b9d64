"""The emulator finds what it claims to find: each broken kernel, in the mode that the table names; correct ones pass.

Every case runs over seeds and kinds of completion of asynchronous copies. `never` in a mode is as much a claim as a
message: it is what the other mode is there for.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.emulator import driver

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))

SOURCES = ["tests/emulator/kernels/selftest.cpp"]
COMPLETIONS = driver.Options.COMPLETIONS
CORRECT = [
    "gemm",
    "gemm one slice",
    "ring",
    "grid barrier",
    "last block",
    "forward wait",
    "bf16",
    "wgmma",
    "count",
    "misuse none",
]

WRONG = "wrong result"
NEVER = None
# case: (what the plain build says, what the checked build says), in every run unless the case is in SOMETIMES.
BROKEN = {
    "gemm short wait": (WRONG, r"gemm.cuh:\d+: read of bytes of a cp.async that is in flight, issued at gemm.cuh"),
    "gemm no barrier": (WRONG, "read of uninitialised memory|race: read|in flight"),
    "gemm early prefetch": (WRONG, "read of uninitialised memory|race: write"),
    "gemm no split order": (WRONG, "read of uninitialised memory, at partial|race: "),
    "gemm relaxed release": (NEVER, "race: read, not ordered after the write at gemm.cuh.* by block [01] .*at partial"),
    "gemm early release": (WRONG, "race: read, not ordered after the write .*at partial|uninitialised.*at partial"),
    "gemm store past end": (
        r"wrote out of bounds: (partial|y)\+",
        r"gemm.cuh:\d+: out of bounds: write of . bytes at (partial|y)",
    ),
    "gemm small smem": (r"gemm.cuh:\d+: cp.async: 16 bytes at shared.* not within",) * 2,
    "gemm misaligned": (r"gemm.cuh:\d+: misaligned: shared",) * 2,
    "gemm no scales": (WRONG, "read of uninitialised memory, at shared"),
    "gemm no accumulators": (WRONG, WRONG),
    "gemm divergent barrier": (r"gemm.cuh:\d+: divergent __syncthreads: .* is at gemm.cuh:\d+",) * 2,
    "gemm divergent ldmatrix": ("ldmatrix.x4 meets mma.m16n8k16|mma.m16n8k16.* meets ldmatrix.x4",) * 2,
    "gemm early exit": ("__syncthreads: 1 threads of the block have exited",) * 2,
    "ring no full wait": ("wrong result|more than the 1 arrivals", "by a bulk copy whose mbarrier|uninitialised"),
    "ring no empty wait": ("more than the 1 arrivals|livelock", "more than the 1 arrivals|race: write"),
    "ring no named barrier": (WRONG, "race: read|race: write|uninitialised memory, at static shared"),
    "ring bad mask": ("masks differ between lanes",) * 2,
    "grid barrier too few blocks": (
        r"livelock: .* in (ld.acquire|nanosleep) at ring.cuh:\d+; .*1 blocks have not started",
    )
    * 2,
    "grid barrier relaxed": (NEVER, "race: read, not ordered after the write at ring.cuh.*at stage"),
    "last block no fence": (NEVER, "race: read, not ordered after the write .*at parts"),
    "forward wait too few blocks": ("livelock: .*5 blocks have not started",) * 2,
    "bf16 half a warp": ("ldmatrix.x4: needs all 32 lanes", "ldmatrix.x4: needs all 32 lanes|uninitialised"),
    "wgmma no wait": (r"wrong result: out\[0\]: got -?nan",) * 2,
    "wgmma short wait": (r"wrong result: out\[2048\]: got -?nan",) * 2,
    "wgmma no barrier": (WRONG, "read of uninitialised memory, at shared|race: read"),
    "wgmma global": (r"warpgroup.cuh:\d+: wgmma: 16 bytes at b\+\d+ .*not within this block's shared memory",) * 2,
    "wgmma past end": (r"warpgroup.cuh:\d+: wgmma: 16 bytes at shared\+\d+ .*not within this block's shared",) * 2,
    "wgmma unaligned": (r"warpgroup.cuh:\d+: wgmma: shared\+\d+ .*is not aligned to 16 bytes",) * 2,
    "wgmma divergent": (r"warpgroup.cuh:\d+: divergent wgmma.f16: other lanes of the warp are at warpgroup.cuh",) * 2,
    "misuse stale load": (NEVER, r"misuse.cuh:\d+: ld.global.nc from out.*, which the kernel may write"),
    "misuse write input": (NEVER, r"misuse.cuh:\d+: write to in\+\d+ .*, which is an input"),
    "misuse barrier short": (r"deadlock: 32 threads of block 0 in bar.sync at misuse.cuh:\d+",) * 2,
    "misuse barrier sizes": (r"bar.sync expects \d+ threads, but misuse.cuh:\d+ expects \d+ at the same barrier",) * 2,
    "misuse no mbarrier": (r"mbarrier.arrive: static shared\+0 .* was not initialised as an mbarrier",) * 2,
    "misuse bulk size": ("cp.async.bulk: 24 bytes, need a positive multiple of 16",) * 2,
    "misuse bulk in flight": ("block 0 ended with a bulk copy into its shared memory in flight",) * 2,
    "misuse shuffle exited": ("__shfl_sync: lane 0 reads lane 5, which does not take part",) * 2,
    "misuse misaligned copy": (r"cp.async: shared\+\d+ .* is not aligned to 16 bytes",) * 2,
    "count past shared": (
        r"wrote out of bounds: static shared\+32",
        "out of bounds: write of 4 bytes at static shared",
    ),
    "count nothing": (
        r"ring.cuh:\d+: fault: nothing is mapped at address 0",
        "out of bounds: read of 4 bytes at address 0",
    ),
    "count shift": (NEVER, "shift of 1 by 32"),
    "count index": (WRONG, "array index 4 is out of bounds"),
}
# The order of threads or of copies can hide these in some of the runs, in this mode.
SOMETIMES = {
    ("gemm short wait", "plain"),
    ("gemm early release", "plain"),
    ("ring no full wait", "plain"),
    ("gemm no split order", "plain"),
    ("ring no named barrier", "plain"),
    *(("misuse bulk in flight", mode) for mode in ("plain", "checked")),
}
# What hides a cp.async that nobody waited for.
HIDDEN_BY_EAGER = {"gemm short wait"}


@pytest.fixture(scope="module", params=["plain", "checked"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def library(mode: str) -> driver.Library:
    return driver.Library(driver.build("selftest", SOURCES, mode))


def outcomes(library: driver.Library, case: str, seeds: int) -> dict[tuple[str, int], str]:
    """What each run said; the empty string for one that passed."""
    said = {}
    for completion in COMPLETIONS:
        for seed in range(seeds):
            try:
                library.call("emu_selftest", driver.Options(seed, completion), case.encode())
                said[completion, seed] = ""
            except driver.KernelError as error:
                said[completion, seed] = str(error)
    return said


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_raise_no_alarm(library: driver.Library, case: str) -> None:
    assert set(outcomes(library, case, seeds=6).values()) == {""}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_kernels_are_caught(library: driver.Library, mode: str, case: str) -> None:
    expected = BROKEN[case][mode == "checked"]
    said = outcomes(library, case, seeds=4)
    if expected is NEVER:
        assert set(said.values()) == {""}
        return
    caught = [message for message in said.values() if message]
    assert [message for message in caught if not re.search(expected, message)] == []
    assert len(caught) == len(said) or (case, mode) in SOMETIMES, said
    assert caught


def test_only_late_copies_show_a_missing_wait(library: driver.Library, mode: str) -> None:
    said = outcomes(library, "gemm short wait", seeds=4)
    eager_runs = [message for (completion, _), message in said.items() if completion == "eager"]
    late_runs = [message for (completion, _), message in said.items() if completion == "lazy"]
    assert all(late_runs)
    assert all(eager_runs) if mode == "checked" else not any(eager_runs)


def test_the_same_seed_gives_the_same_run(library: driver.Library) -> None:
    first, second = (outcomes(library, "gemm no split order", seeds=3) for _ in range(2))
    assert first == second
    assert len(set(first.values())) > 1


@pytest.fixture(scope="module")
def asan_program() -> Path:
    return driver.build("selftest", SOURCES, "asan")


def run_asan(program: Path, case: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, case, "0", "2"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass_under_asan(asan_program: Path, case: str) -> None:
    done = run_asan(asan_program, case)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gemm misaligned", r"gemm.cuh:\d+.*runtime error: .*misaligned address .* requires 16 byte alignment"),
        ("count shift", r"ring.cuh:\d+.*runtime error: shift exponent 32 is too large"),
        ("count index", r"ring.cuh:\d+.*runtime error: index 4 out of bounds"),
        ("count far past shared", r"ring.cuh:\d+.*runtime error: index 4000 out of bounds"),
    ],
)
def test_broken_kernels_fail_under_asan(asan_program: Path, case: str, message: str) -> None:
    done = run_asan(asan_program, case)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


def test_launches_are_refused_with_the_numbers(library: driver.Library) -> None:
    with pytest.raises(driver.KernelError, match="launch: resident_blocks: got 0, need at least 1"):
        library.call("emu_selftest", driver.Options(resident_blocks=0), b"gemm")
    with pytest.raises(driver.KernelError, match="no case named nothing"):
        library.call("emu_selftest", driver.Options(), b"nothing")
