"""Other people's INT3/INT4 kernels for bench_gemm.py, each called the way its own authors tuned it.

An adapter takes x [m, k] fp16 on the GPU, n, the bits and the group size. It gives a maker of calls, and the bytes of
packed weight that one call reads: codes, scales, zeros, at the width they are stored with. Every call that is made owns
a clone of these tensors, so that taking turns finds none of them in L2. Before that, a captured call has to agree with
a matmul by the dequantised weight: a kernel that is called wrongly would be an unfair comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TypeVar

import torch
from gpu_timing import graph_of
from torch import Tensor

Call = Callable[[], Tensor]
Made = tuple[Callable[[], Call], int]
Rival = tuple[int, Callable[[Tensor, int, int, int], Made], Callable[[], object]]  # bits, adapter, raises if not there
T = TypeVar("T")

MAX_ERROR = 2e-2  # relative; fp16 kernels stay near 1e-3, a wrong layout gives about 1
WARM_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256]  # their humming kernels are compiled in parallel, once per shape
HUMMING_LOCKS = 2048  # the size of those in humming's own layer


def random_weight(n: int, k: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k] uint8, scales [n, k / group] fp16, and (codes - 2^(bits - 1)) * scales [n, k] fp32."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = ((0.5 + torch.rand(n, k // group, device="cuda")) / k**0.5).half()
    weight = (codes.float() - 2 ** (bits - 1)).unflatten(1, (-1, group)) * scales.float()[:, :, None]
    return codes, scales, weight.flatten(1)


def require_agreement(call: Call, x: Tensor, weight: Tensor) -> None:
    """Captures the call and replays it twice (locks have to be left as they were found); result ~ x @ weight.T."""
    outputs: list[Tensor] = []
    graph = graph_of([lambda: outputs.append(call())])
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    want = x.float() @ weight.T
    error = float((outputs[-1].float() - want).norm() / want.norm())
    if not error < MAX_ERROR:  # not `>=`: NaN has to fail too
        raise ArithmeticError(f"relative error {error:.2e} against its own dequantised weight, limit {MAX_ERROR}")


def humming(x: Tensor, n: int, bits: int, group: int) -> Made:
    """humming: symmetric, fp16 scales, kernels compiled for the shape, tiles chosen by its heuristics for m."""
    forward, transform = import_module("humming.forward"), import_module("humming.transform")
    tune, pack = import_module("humming.tune").get_heuristics_config, import_module("humming.ops").pack_weight
    m, k = x.shape
    codes, scales, weight = random_weight(n, k, bits, group)
    schema = import_module("humming.schema").HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_group_size=group)
    raw = {"weight": pack(codes.int(), bits), "weight_scale": scales}
    config, packed = transform.prepare_and_transform_humming_tensors(raw, n, k, schema, torch_dtype=x.dtype)
    locks = torch.zeros(HUMMING_LOCKS, dtype=torch.int32, device="cuda")
    tuning = json.dumps(tune(config, shape_m=m))
    warm = dict.fromkeys(json.dumps(tune(config, shape_m=tokens)) for tokens in WARM_TOKENS)
    kernels = import_module("humming.kernel.humming").HummingKernel
    kernels.prepare_kernels(config.to_str(), None, [(0, 1 << 30, json.loads(tile)) for tile in warm])

    def make() -> Call:
        own = {name: tensor.clone() for name, tensor in packed.items()}
        return lambda: forward.humming_forward(config, x, **own, locks=locks, tuning_config=tuning)

    require_agreement(make(), x, weight)
    return make, sum(tensor.nbytes for tensor in packed.values())


RIVALS: dict[str, Rival] = {
    "humming_int3": (3, humming, partial(import_module, "humming.layer")),
    "humming_int4": (4, humming, partial(import_module, "humming.layer")),
}


def attempt(label: str, act: Callable[[], T], not_run: dict[str, str]) -> T | None:
    """act(), or None and a reason in not_run."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001  third-party code fails in its own ways and must not cost us the run
        not_run[label] = f"{type(error).__name__}: {error}"
        return None


def available() -> dict[str, str]:
    """Rivals that cannot be loaded on this machine, and why; the others of RIVALS can."""
    not_run: dict[str, str] = {}
    for name, (_, _, load) in RIVALS.items():
        attempt(name, load, not_run)
    return not_run


def prepared(x: Tensor, n: int, group: int, not_run: dict[str, str]) -> dict[str, Made]:
    """Checked makers of all rivals for one problem. Skips what not_run names, and adds what fails at this shape."""
    made: dict[str, Made] = {}
    for name, (bits, adapter, _) in RIVALS.items():
        if name in not_run:
            continue
        label = f"{name} {n}x{x.size(1)} m={x.size(0)}"
        ready = attempt(label, partial(adapter, x, n, bits, group), not_run)
        if ready is not None:
            made[name] = ready
    return made
