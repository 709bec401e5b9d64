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
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch

from rosaq import _C

T = TypeVar("T")
READ_BYTES = 256 << 20  # per thread; well over any last-level cache of a desktop


def rotate_copies(make: Callable[[], T], bytes_each: int, total_bytes: int) -> Iterator[T]:
    """An endless rotation over copies of one weight, at least `total_bytes` together: no call finds it cached."""
    copies = [make() for _ in range(max(2, -(-total_bytes // bytes_each)))]
    return cycle(copies)


def medians(
    candidates: Mapping[str, Callable[[], object]], rounds: int, min_seconds: float = 0.0, pause: float = 0.0
) -> dict[str, float]:
    """Seconds per call of each candidate, the median over `rounds` rounds that call every candidate once in turn.

    Goes on past `rounds` until `min_seconds` have been spent. `pause` seconds of sleep come before every call.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < min_seconds:
        for name, call in candidates.items():
            if pause > 0:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        done += 1
    return {name: statistics.median(samples) for name, samples in times.items()}


@cache
def _read_loop() -> Any:
    """read_bandwidth.cpp, compiled at the first call: torch's own sums stay well below what memory gives."""
    source = Path(__file__).with_name("read_bandwidth.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_bandwidth.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
        read = ctypes.CDLL(str(library)).read_bytes_per_second
    read.restype, read.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    return read


def read_bandwidth() -> float:
    """Bytes per second that as many threads as torch has read together, best of 9 rounds over READ_BYTES each.

    To be measured beside what it is compared with: a virtual machine's cores may move between parts of a processor that
    share their way to memory and parts that do not.
    """
    best = float(_read_loop()(torch.get_num_threads(), READ_BYTES, 9))
    if best == 0.0:
        raise RuntimeError(f"read_bandwidth: got no {READ_BYTES * torch.get_num_threads()} bytes of memory, need them")
    return best


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
