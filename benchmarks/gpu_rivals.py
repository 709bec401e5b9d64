"""Other people's INT3/INT4 kernels for bench_gemm.py, each called the way its own authors tuned it.

An adapter takes x [m, k] fp16 on the GPU, n, the bits and the group size. It gives a maker of calls, and the bytes of
packed weight that one call reads: codes, scales, zeros, at the width they are stored with. Every call that is made owns
a clone of these tensors, so that taking turns finds none of them in L2. Before that, a captured call has to agree with
a matmul by the dequantised weight: a kernel that is called wrongly would be an unfair comparison.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

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
MARLIN_PARALLEL = 16  # batches of 64 tokens in one launch, and locks per 128 columns


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


@cache
def gemlite_configs() -> dict[str, dict[str, Any]]:
    """The tiles that gemlite ships for the H100, on any card: kernel -> str((m, n, k, group, 8, type)) -> tile."""
    core = import_module("gemlite.core")
    shipped = Path(core.__file__).with_name("configs") / "h100.json"
    if not core.GemLiteLinear.load_config(str(shipped)):
        raise FileNotFoundError(f"gemlite could not load {shipped.name}")
    return core.GEMLITE_TRITON_CONFIG_CACHE


def gemlite_kernel(m: int, n: int, k: int, group: int) -> int:
    """The kernel gemlite picks for m, or split-k where only that one is tuned. Tuning here would take minutes."""
    core, utils = import_module("gemlite.core"), import_module("gemlite.triton_kernels.utils")
    fp16_int4 = 100 * core.DType.FP16.value + 4
    key = str((utils.get_closest_m(m), n, k, group, 8, fp16_int4))
    for kind in (core.get_matmul_type(m, 4), "GEMM_SPLITK"):
        if key in gemlite_configs().get(kind, {}):
            return core.GEMLITE_MATMUL_TYPES_MAPPING[kind]
    raise LookupError(f"gemlite ships no H100 tile for m={m}, n={n}, k={k}, group {group}")


def gemlite(x: Tensor, n: int, bits: int, group: int) -> Made:
    """gemlite: W4A16 with fp16 scales and zeros (the layout its shipped tiles were tuned for), Triton."""
    core, helper = import_module("gemlite.core"), import_module("gemlite.helper")
    m, k = x.shape
    kernel = gemlite_kernel(m, n, k, group)
    codes, scales, weight = random_weight(n, k, bits, group)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    layer = helper.A16Wn_HQQ_INT(device=x.device, dtype=x.dtype, W_nbits=bits).from_weights(codes, scales, zeros)
    packed, meta = [tensor.detach() for tensor in layer.get_tensor_args()], layer.get_meta_args()

    def make() -> Call:
        own = [tensor.clone() for tensor in packed]
        return lambda: core.forward_functional(x, None, own, meta, kernel)

    require_agreement(make(), x, weight)
    return make, sum(tensor.nbytes for tensor in packed)


def marlin_packed(codes: Tensor, scales: Tensor) -> list[Tensor]:
    """Codes [n, k], scales [n, k / 128] -> int32 [k / 16, 2 n] and fp16 [k / 128, n] in the order of mma fragments."""
    n, k = codes.shape
    # k is (tile, half, thread of a group, pair); n is (64 columns, tile, half, group of threads)
    split = codes.int().T.reshape(k // 16, 2, 4, 2, n // 64, 4, 2, 8)
    nibbles = split.permute(0, 4, 7, 2, 5, 3, 6, 1).reshape(k // 16, 2 * n, 8)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device)
    fragments = scales.T.reshape(-1, n // 64, 8, 8).transpose(2, 3).reshape(-1, n)
    return [(nibbles << shifts).sum(-1, dtype=torch.int32), fragments.contiguous()]


def marlin_entry(library: Path | None) -> Any:
    """marlin_gemm(a, b, c, s, m, n, k, workspace, groupsize, dev, stream, thread_k, thread_n, sms, max_par) -> code."""
    if library is None:
        raise FileNotFoundError("marlin is not on PyPI: no library was given")
    entry = ctypes.CDLL(str(library)).marlin_gemm
    pointer, number = ctypes.c_void_p, ctypes.c_int
    entry.argtypes = [pointer] * 4 + [number] * 3 + [pointer] + [number] * 2 + [pointer] + [number] * 4
    return entry


def marlin(x: Tensor, n: int, bits: int, group: int, *, library: Path | None) -> Made:
    """The first Marlin: INT4, groups of 128, symmetric; its own choice of tiles."""
    entry, (m, k) = marlin_entry(library), x.shape
    if bits != 4 or group != 128 or n % 256 or k % 128:
        raise ValueError(f"marlin: INT4, groups of 128, n % 256 = k % 128 = 0; got INT{bits}, {group}, n={n}, k={k}")
    codes, scales, weight = random_weight(n, k, bits, group)
    packed = marlin_packed(codes, scales)
    locks = torch.zeros(n // 128 * MARLIN_PARALLEL, dtype=torch.int32, device="cuda")

    def run(fragments: Tensor, own_scales: Tensor) -> Tensor:
        y, stream = x.new_empty(m, n), torch.cuda.current_stream().cuda_stream
        operands = [tensor.data_ptr() for tensor in (x, fragments, y, own_scales)]
        code = entry(*operands, m, n, k, locks.data_ptr(), group, x.get_device(), stream, -1, -1, -1, MARLIN_PARALLEL)
        if code:
            raise RuntimeError(f"marlin gave code {code} for m={m}, n={n}, k={k} (1: shape, 2: tile, 1000 + CUDA's)")
        return y

    def make() -> Call:
        return partial(run, *(tensor.clone() for tensor in packed))

    require_agreement(make(), x, weight)
    return make, sum(tensor.nbytes for tensor in packed)


def rivals(library: Path | None) -> dict[str, Rival]:
    """By name; `library` is a shared library with marlin_gemm, compiled from marlin's kernel file."""
    return {
        "humming_int3": (3, humming, partial(import_module, "humming.layer")),
        "humming_int4": (4, humming, partial(import_module, "humming.layer")),
        "gemlite_int4": (4, gemlite, gemlite_configs),
        "marlin_int4": (4, partial(marlin, library=library), partial(marlin_entry, library)),
    }


def attempt(label: str, act: Callable[[], T], not_run: dict[str, str]) -> T | None:
    """act(), or None and a reason in not_run."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001  third-party code fails in its own ways and must not cost us the run
        not_run[label] = f"{type(error).__name__}: {error}"
        return None


def available(library: Path | None) -> dict[str, str]:
    """Rivals that cannot be loaded on this machine, and why; the others of rivals() can."""
    not_run: dict[str, str] = {}
    for name, (_, _, load) in rivals(library).items():
        attempt(name, load, not_run)
    return not_run


def prepared(x: Tensor, n: int, group: int, library: Path | None, not_run: dict[str, str]) -> dict[str, Made]:
    """Checked makers of all rivals for one problem. Skips what not_run names, and adds what fails at this shape."""
    made: dict[str, Made] = {}
    for name, (bits, adapter, _) in rivals(library).items():
        if name in not_run:
            continue
        label = f"{name} {n}x{x.size(1)} m={x.size(0)}"
        ready = attempt(label, partial(adapter, x, n, bits, group), not_run)
        if ready is not None:
            made[name] = ready
    return made
