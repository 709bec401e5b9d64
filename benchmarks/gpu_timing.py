"""Timing on a GPU: captured graphs over rotated weights, so that neither Python nor the L2 cache flatters anybody."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

CALLS_PER_GRAPH = 20
REPLAYS = 100
ROTATED_L2 = 4  # weights in rotation are at least this many times the L2 cache


def copies_needed(bytes_each: int) -> int:
    """How many copies of a weight make every call find its own outside of L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-ROTATED_L2 * l2 // max(bytes_each, 1)))


def graph_of(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls one after another in one graph, warmed up before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def median_us(candidates: dict[str, list[Callable[[], object]]], replays: int = REPLAYS) -> dict[str, float]:
    """Microseconds per call of each candidate: a graph of its calls, replayed in turn with the others, the median."""
    graphs = {name: graph_of(calls) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / len(candidates[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def copy_bandwidth() -> float:
    """Bytes per second read and written together by a large device-to-device copy, the median."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = median_us({"copy": [lambda: target.copy_(source)]}, replays=20)["copy"]
    return 2 * source.numel() / (us * 1e-6)


def gpu() -> dict[str, Any]:
    """What a result depends on: the card, its clocks now and at most, driver, versions."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    query = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")] if done.returncode == 0 else []
    properties = torch.cuda.get_device_properties(0)
    return dict(zip(fields.split(","), values, strict=False)) | {
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
