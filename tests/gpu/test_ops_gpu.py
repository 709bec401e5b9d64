"""The ops on a real GPU: the whole suite of the CPU op, and what only a device shows (graphs, streams, large m)."""

from __future__ import annotations

import pytest
import torch
from cases import CUDA_OPTIONS, Case, Linear, build, case_id, make_linear, make_x, pairwise_cases, random_rotation
from tolerances import assert_as_good_as
from torch import Tensor

from rosaq import _C, RosaqLinear, ops
from rosaq.config import LinearFormat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.build_info()["cuda"]),
        reason="needs a CUDA device, a torch that sees it, and a rosaq built with nvcc",
    ),
]
OPTIONS = CUDA_OPTIONS | {"m": [*CUDA_OPTIONS["m"], 65, 128, 300], "x_layout": ["plain", "transposed", "3d"]}
CASES = pairwise_cases(OPTIONS)
DEVICE = torch.device("cuda")


def on_gpu(linear: Linear) -> Linear:
    extras = {name: None if t is None else t.to(DEVICE) for name, t in linear.extras.items()}
    zeros = None if linear.zeros is None else linear.zeros.to(DEVICE)
    return Linear(linear.fmt, linear.qweight.to(DEVICE), linear.scales.to(DEVICE), zeros, extras)


def with_everything(n: int = 576, k: int = 768, r: int = 33) -> Linear:
    linear = make_linear(n, k, 3, 64, symmetric=False)
    linear.extras |= {
        "salient_weight": (torch.randn(n, r) / k**0.5).half(),
        "salient_basis": torch.linalg.qr(torch.randn(k, r)).Q.half(),
        "rotation": random_rotation(k // 128, 128),
        "bias": torch.randn(n).half(),
    }
    return linear


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_fused_gemm_is_as_good_as_pytorch(case: Case) -> None:
    linear, x = build(case)
    expected, device_linear = linear.expected(x), on_gpu(linear)
    y = device_linear.run(x.to(DEVICE))
    assert_as_good_as(y.cpu(), device_linear.plain(x.to(DEVICE)).cpu(), expected)
    assert torch.equal(y, device_linear.run(x.to(DEVICE)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rows", [8, 60, 480])
def test_identity_gives_the_dequantised_weight_exactly(
    rows: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    linear = make_linear(264, 480, bits, 32, symmetric)
    packed, device_linear = on_gpu(linear).packed(), on_gpu(linear)
    parts = [device_linear.run(x, packed) for x in torch.eye(480, dtype=dtype, device=DEVICE).split(rows)]
    assert torch.equal(torch.cat(parts).T.cpu(), linear.dequantized().to(dtype))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_repacking_is_exact(bits: int, scale_dtype: str) -> None:
    linear = make_linear(136, 192, bits, 64, symmetric=False, scale_dtype=scale_dtype)
    device_linear = on_gpu(linear)
    qweight, scales, zeros = ops.unprepack(device_linear.packed())
    assert torch.equal(qweight.cpu(), linear.qweight)
    assert torch.equal(scales.cpu().view(torch.int16), linear.scales.view(torch.int16))
    assert zeros is not None
    assert torch.equal(zeros.cpu(), linear.zeros)
    codes = ops.unpack(device_linear.qweight, bits)
    assert torch.equal(codes.cpu(), ops.unpack(linear.qweight, bits))
    assert torch.equal(ops.pack(codes, bits).cpu(), linear.qweight)
    with pytest.raises(RuntimeError, match=r"codes: got 255, need 0 to"):
        ops.pack(torch.full((8, 32), 255, dtype=torch.uint8, device=DEVICE), bits)


def test_a_captured_graph_replays_with_new_inputs() -> None:
    linear = on_gpu(with_everything())
    packed, static_x = linear.packed(), make_x(9, linear.k, "float16").to(DEVICE)
    linear.run(static_x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_y = linear.run(static_x, packed)
    for seed in range(3):
        torch.manual_seed(seed)
        x = make_x(9, linear.k, "float16").to(DEVICE)
        static_x.copy_(x)
        graph.replay()
        assert torch.equal(static_y, linear.run(x, packed))


def test_streams_and_graphs_do_not_meet() -> None:
    """Eager calls on two streams and replays of two graphs, all at once and of the same weight."""
    linear = on_gpu(with_everything())
    packed = linear.packed()
    inputs = [make_x(m, linear.k, "float16").to(DEVICE) for m in (1, 9, 16, 40)]
    expected = [linear.run(x, packed) for x in inputs]
    graphs, outputs = [], []
    for x in inputs[2:]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(linear.run(x, packed))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    eager: list[Tensor] = []
    for _ in range(20):
        for stream, x in zip(streams[:2], inputs[:2], strict=True):
            with torch.cuda.stream(stream):
                eager.append(linear.run(x, packed))
        for stream, graph in zip(streams[2:], graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(eager))
    assert all(torch.equal(y, z) for y, z in zip(outputs, expected[2:], strict=True))


def test_blocks_of_few_and_many_warps_take_turns() -> None:
    """The kernel for a few tokens has more warps in a block where there are few rows."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for n in (64, 64 * sms + 32, 64):
        linear, x = make_linear(n, 768, 3, 64), make_x(3, 768, "float16")
        y = on_gpu(linear).run(x.to(DEVICE))
        assert_as_good_as(y.cpu(), on_gpu(linear).plain(x.to(DEVICE)).cpu(), linear.expected(x))


@pytest.mark.parametrize("num_rows", [64, 64 * 256], ids=["16 warps", "8 warps"])
@pytest.mark.parametrize(("k", "r"), [(384, 160), (640, 8), (1024, 33), (2112, 65), (11008, 128)])
@pytest.mark.parametrize("m", [1, 8])
def test_any_warp_of_the_kernel_for_a_few_tokens_may_take_salient_channels(
    m: int, k: int, r: int, num_rows: int
) -> None:
    linear, x = make_linear(num_rows, k, 3, 32), make_x(m, k, "float16")
    linear.extras |= {
        "salient_weight": torch.randn(num_rows, r).half(),
        "salient_index": torch.randperm(k)[:r].int(),
    }
    y = on_gpu(linear).run(x.to(DEVICE))
    assert_as_good_as(y.cpu(), on_gpu(linear).plain(x.to(DEVICE)).cpu(), linear.expected(x))


@pytest.mark.parametrize(
    ("m", "k", "b", "r"), [(1, 4096, 0, 2), (8, 1408, 0, 8), (1, 11008, 128, 2), (16, 4096, 32, 2)]
)
def test_blocks_project_their_own_slices(m: int, k: int, b: int, r: int) -> None:
    linear, x = make_linear(4096, k, 3, -1, symmetric=False), make_x(m, k, "float16")
    linear.extras |= {
        "salient_weight": torch.randn(4096, r).half(),
        "salient_basis": torch.linalg.qr(torch.randn(k, r)).Q.half(),
        "rotation": random_rotation(1, b) if b else None,
    }
    y = on_gpu(linear).run(x.to(DEVICE))
    assert_as_good_as(y.cpu(), on_gpu(linear).plain(x.to(DEVICE)).cpu(), linear.expected(x))


@pytest.mark.parametrize(("n", "k", "group_size"), [(4096, 4096, 128), (1024, 11008, -1), (14336, 1024, 64)])
@pytest.mark.parametrize("m", [17, 33, 64, 100])
def test_large_linears_with_some_tokens(m: int, n: int, k: int, group_size: int) -> None:
    """Many K-tiles a block and row tiles that several blocks share: the stages of the rings come round, often."""
    linear, x = make_linear(n, k, 4, group_size), make_x(m, k, "float16")
    linear.extras |= {"salient_weight": torch.randn(n, 40).half(), "salient_index": torch.randperm(k)[:40].int()}
    device_linear, x_there = on_gpu(linear), x.to(DEVICE)
    packed = device_linear.packed()
    y = device_linear.run(x_there, packed)
    assert_as_good_as(y.cpu(), device_linear.plain(x_there).cpu(), linear.expected(x))
    assert all(torch.equal(y, device_linear.run(x_there, packed)) for _ in range(20))


@pytest.mark.parametrize("m", [128, 129, 255, 1024])
def test_both_sides_of_the_switch_to_a_plain_matmul_agree(m: int) -> None:
    linear = with_everything()
    x = make_x(m, linear.k, "float16")
    y = on_gpu(linear).run(x.to(DEVICE))
    assert_as_good_as(y.cpu(), on_gpu(linear).plain(x.to(DEVICE)).cpu(), linear.expected(x))


@pytest.mark.parametrize("rotation", [None, (1, 768), (6, 128)], ids=["no rotation", "one block", "six blocks"])
@pytest.mark.parametrize(("dtype", "of_autocast"), [("float16", torch.bfloat16), ("bfloat16", torch.float16)])
def test_autocast_leaves_many_tokens_alone(
    dtype: str, of_autocast: torch.dtype, rotation: tuple[int, int] | None
) -> None:
    """From 129 tokens on the op calls torch's products, which autocast would give its own dtype."""
    linear = with_everything()
    linear.extras["rotation"] = None if rotation is None else random_rotation(*rotation)
    there, x = on_gpu(linear), make_x(129, linear.k, dtype).to(DEVICE)
    packed = there.packed()
    expected = there.run(x, packed)
    with torch.autocast("cuda", dtype=of_autocast):
        assert (x @ x.T).dtype == of_autocast
        y = there.run(x, packed)
    assert y.dtype == x.dtype
    assert torch.equal(y, expected)


def test_many_tokens_that_require_a_gradient_are_multiplied_all_the_same() -> None:
    there = on_gpu(with_everything())
    packed, x = there.packed(), make_x(129, there.k, "float16").to(DEVICE)
    expected = there.run(x, packed)
    assert torch.equal(there.run(x.requires_grad_(), packed).detach(), expected)
    assert torch.is_grad_enabled()


def test_compile_and_opcheck() -> None:
    linear = on_gpu(with_everything())
    packed, x = linear.packed(), make_x(5, linear.k, "float16").to(DEVICE)
    args = (x, packed, *linear.extras.values(), *linear.int_args().values())
    torch.library.opcheck(torch.ops.rosaq.fused_gemm.default, args)
    compiled = torch.compile(lambda t: linear.run(t, packed) * 2, fullgraph=True)
    assert torch.equal(compiled(x), linear.run(x, packed) * 2)


def test_a_module_moves_between_devices_bit_for_bit() -> None:
    linear = make_linear(64, 128, 3, 64, symmetric=False)
    tensors = {"qweight": linear.qweight, "scales": linear.scales, "zeros": linear.zeros}
    module = RosaqLinear.from_tensors(dict(tensors), LinearFormat(3, 64, symmetric=False))
    x = make_x(4, 128, "float16")
    on_cpu = module(x)
    moved = module.to(DEVICE)
    assert_as_good_as(moved(x.to(DEVICE)).cpu(), on_cpu, linear.expected(x))
    back = moved.cpu().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, packed: (x.cpu(), packed), "x: got a tensor on the CPU, need it beside the CUDA tensors"),
        (lambda x, packed: (x, packed.cpu()), "packed: got a tensor on the CPU, need it beside x on device 0"),
        (lambda x, packed: (x.float(), packed), "x: got dtype Float, need Half, BFloat16"),
        (lambda x, packed: (x, packed[:-1]), r"packed: got \d+ bytes, need \d+ \(float16 scales\)"),
        (lambda x, packed: (x[:, :-64], packed), r"packed: got \d+ bytes, need \d+"),
        (lambda x, packed: (x.flatten()[1 : 1 + x.size(1)], packed), "x: got an address 2 bytes past a multiple of 16"),
    ],
)
def test_bad_calls_are_refused_before_any_launch(change, message: str) -> None:  # type: ignore[no-untyped-def]
    linear = on_gpu(make_linear(64, 128, 3, 64))
    x, packed = change(make_x(4, 128, "float16").to(DEVICE), linear.packed())
    with pytest.raises(RuntimeError, match=message):
        linear.run(x, packed)


def test_a_cpu_blob_is_not_taken_for_a_cuda_blob() -> None:
    linear = make_linear(64, 128, 3, 64)
    blob = linear.packed().to(DEVICE)
    with pytest.raises(RuntimeError, match=r"packed: got \d+ bytes, need \d+ .*prepack the weight on this device"):
        on_gpu(linear).run(make_x(1, 128, "float16").to(DEVICE), blob)
    with pytest.raises(RuntimeError, match="do not start with the mark of a CUDA blob"):
        ops.unprepack(blob)
