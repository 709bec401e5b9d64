"""What one call costs beside its arithmetic: microseconds for a linear too small to take time. Prints JSON.

    python benchmarks/bench_call.py

`torch_linear` is `nn.Linear` of the same size, the price of any module call in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from timing import machine, medians
from torch import Tensor, nn

from rosaq import LinearFormat, RosaqLinear, ops

SIZE = 32  # k and n
CALLS = 1000  # of each candidate in a turn


def make_linear(*, extras: bool) -> RosaqLinear:
    """INT4 of random codes; the extras are a basis of two directions and a rotation, as down_proj of a preset has."""
    tensors = {
        "qweight": ops.pack(torch.randint(0, 16, (SIZE, SIZE), dtype=torch.uint8), 4),
        "scales": torch.rand(SIZE, 1).half(),
    }
    if not extras:
        return RosaqLinear.from_tensors(tensors, LinearFormat(group_size=SIZE, symmetric=True))
    tensors |= {name: torch.randn(SIZE, 2).half() for name in ("salient_weight", "salient_basis")}
    tensors["rotation"] = torch.eye(SIZE)[None].half()
    fmt = LinearFormat(
        group_size=SIZE, symmetric=True, num_salient=2, salient="basis", rotation_blocks=1, rotation_size=SIZE
    )
    return RosaqLinear.from_tensors(tensors, fmt)


def repeated(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            module(x)

    return run


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(1, SIZE).bfloat16()
    modules: dict[str, nn.Module] = {
        "torch_linear": nn.Linear(SIZE, SIZE, bias=False).bfloat16(),
        "rosaq_linear": make_linear(extras=False),
        "rosaq_linear_basis_rotation": make_linear(extras=True),
    }
    seconds = medians({name: repeated(module, x) for name, module in modules.items()}, rounds=21)
    microseconds = {name: round(s / CALLS * 1e6, 2) for name, s in seconds.items()}
    print(json.dumps({"machine": machine(), "microseconds": microseconds}))


if __name__ == "__main__":
    main()
