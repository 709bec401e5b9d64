"""Timing on a machine that others use too: alternate the candidates, take medians, keep weights out of the cache.

Numbers of different runs do not compare; ratios within one run do.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch

from rosaq import _C

T = TypeVar("T")
READ_BYTES = 128 << 20  # per thread; over any last-level cache of a desktop
TURN_SECONDS = 0.05
PAUSE = 0.01  # seconds before a turn, in which the threads of another library go to sleep


def rotate_copies(make: Callable[[], T], bytes_each: int, total_bytes: int) -> Iterator[T]:
    """An endless rotation over copies of one weight, at least `total_bytes` together: no call finds it cached."""
    copies = [make() for _ in range(max(2, -(-total_bytes // bytes_each)))]
    return cycle(copies)


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int, pause: float = 0.0) -> dict[str, float]:
    """Seconds per call of each candidate, the median over `rounds` rounds that call every candidate once in turn.

    With `pause`, that many seconds of sleep and a call that does not count come first: the other library's threads go
    to sleep, and the candidate's own, woken up together on one core, spread over all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            if pause > 0:
                time.sleep(pause)
                call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def calls_in_a_row(call: Callable[[], object], seconds: float = TURN_SECONDS) -> tuple[Callable[[], None], int]:
    """A turn for `medians` of about `seconds`, and how many calls it is.

    A layer comes after layers of its kind in a model. Behind a layer of another library a call of 0.2 ms takes up to a
    quarter longer: what that one wrote is still on its way to memory.
    """
    call()  # scratch memory, threads
    start = time.perf_counter()
    call()
    count = max(1, int(seconds / (time.perf_counter() - start)))

    def turn() -> None:
        for _ in range(count):
            call()

    return turn, count


@cache
def _read_library() -> Any:
    """read_bandwidth.cpp, compiled at the first call: torch's own sums stay well below what memory gives."""
    source = Path(__file__).with_name("read_bandwidth.cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "read_bandwidth.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.open_memory.restype, library.open_memory.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_size_t]
    memory = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    library.read_memory.restype, library.read_memory.argtypes = ctypes.c_uint64, [*memory, ctypes.c_bool]
    library.close_memory.restype, library.close_memory.argtypes = None, memory
    return library


class MemoryRead:
    """Two turns for `medians` that read memory with as many threads as torch has and do nothing else.

    They take turns with what they are compared with: a virtual machine's cores may move between parts of a processor
    that share their way to memory and parts that do not.
    """

    def __init__(self, bytes_per_thread: int = READ_BYTES) -> None:
        self._sizes = torch.get_num_threads(), bytes_per_thread
        self._bytes = self._sizes[0] * bytes_per_thread
        self._memory = _read_library().open_memory(*self._sizes)
        if self._memory is None:
            raise MemoryError(f"bytes_per_thread: got no {self._bytes} bytes of memory for all threads, need them")
        self.turns = {"read": partial(self._read, ahead=False), "read_ahead": partial(self._read, ahead=True)}

    def _read(self, ahead: bool) -> None:
        words = _read_library().read_memory(self._memory, *self._sizes, ahead)
        if words * 8 != self._bytes:
            raise RuntimeError(f"read_memory: read {words * 8} bytes, need {self._bytes}")

    def bandwidth(self, seconds: Mapping[str, float]) -> float:
        """Bytes per second of the faster turn, from the medians of both. Gives the memory back."""
        _read_library().close_memory(self._memory, *self._sizes)
        return self._bytes / min(seconds[name] for name in self.turns)


def machine() -> dict[str, Any]:
    """What a result depends on: CPU, threads, instruction set, versions, commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": _C.active_isa(),
        "available_isas": _C.available_isas(),
        "build": _C.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def write_rows(setting: dict[str, Any], rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    """Print machine and setting, then every row as it comes; all of it into the JSON file `out` at the end."""
    head = {"machine": machine(), "setting": setting}
    print(json.dumps(head))
    done = []
    for row in rows:
        print(json.dumps(row), flush=True)
        done.append(row)
    if out is not None:
        out.write_text(json.dumps(head | {"rows": done}, indent=1) + "\n")
