"""RosaqLinear: what it computes, how it moves and saves, and what it refuses."""

import copy
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rosaq.config import LinearFormat
from rosaq.layout import pack
from rosaq.linear import PACKED_NAMES, RosaqLinear
from rosaq.ops import check_device
from rosaq.specs import QuantSpec
from tests.tolerances import assert_as_good_as, assert_close_in

FORMATS = {
    "int4-g128": LinearFormat(4, 128),
    "int3-symmetric": LinearFormat(3, 64, symmetric=True),
    "int3-index": LinearFormat(3, 64, num_salient=8),
    "int4-basis": LinearFormat(4, 32, num_salient=4, salient="basis"),
    "int3-shared-rotation": LinearFormat(3, -1, rotation_blocks=1, rotation_size=32),
    "int4-own-rotations-index": LinearFormat(4, 64, num_salient=4, rotation_blocks=4, rotation_size=32),
}


def random_tensors(fmt, n=24, k=128, *, bias=True, seed=0):
    """Disk-layout tensors of a random linear, its salient columns zeroed as the format asks."""
    generator = torch.Generator().manual_seed(seed)
    groups, r = fmt.groups_of(k), fmt.num_salient
    zeros = torch.randint(1, 2**fmt.bits, (n, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 2**fmt.bits, (n, k), generator=generator, dtype=torch.uint8)
    tensors = {"scales": (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).half()}
    index = torch.randperm(k, generator=generator)[:r]
    if fmt.symmetric:
        codes[:, index] = 2 ** (fmt.bits - 1)
    else:
        tensors["zeros"] = zeros
        codes[:, index] = zeros.repeat_interleave(k // groups, 1)[:, index]
    tensors["qweight"] = pack(codes, fmt.bits)
    if r:
        tensors["salient_weight"] = torch.randn(n, r, generator=generator).half()
        if fmt.salient == "index":
            tensors["salient_index"] = index.to(torch.int32)
        else:
            tensors["salient_basis"] = torch.linalg.qr(torch.randn(k, r, generator=generator))[0].half()
    if fmt.rotation_size:
        b = fmt.rotation_size
        blocks = torch.randn(fmt.rotation_blocks, b, b, generator=generator)
        tensors["rotation"] = torch.linalg.qr(blocks)[0].half()
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).half()
    return {name: tensors[name] for name in fmt.tensor_shapes(k, n, bias=bias)}


def assert_same_tensors(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture(params=FORMATS, name="fmt")
def _fmt(request):
    return FORMATS[request.param]


# --- value ----------------------------------------------------------------------------------------------------------


def test_forward_is_the_dense_layer_of_dequantize(fmt):
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt)
    x, weight, bias = torch.randn(5, 128), linear.dequantize(), linear.bias.float()
    want = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_as_good_as(linear(x), nn.functional.linear(x, weight, bias), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128,), (0, 128), (1, 128), (2, 3, 128)])
def test_result_has_the_shape_and_dtype_of_the_input(dtype, shape):
    fmt = FORMATS["int3-index"]
    y = RosaqLinear.from_tensors(random_tensors(fmt), fmt)(torch.randn(shape).to(dtype))
    assert y.shape == (*shape[:-1], 24)
    assert y.dtype == dtype


def test_dequantize_of_hand_made_codes():
    fmt = LinearFormat(4, 32, num_salient=1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 2)
    codes[:, 3] = 5
    tensors = {
        "qweight": pack(codes, 4),
        "scales": torch.full((8, 1), 0.5, dtype=torch.float16),
        "zeros": torch.full((8, 1), 5, dtype=torch.uint8),
        "salient_weight": torch.full((8, 1), 7.0, dtype=torch.float16),
        "salient_index": torch.tensor([3], dtype=torch.int32),
    }
    want = (codes.float() - 5) * 0.5
    want[:, 3] = 7.0
    assert torch.equal(RosaqLinear.from_tensors(tensors, fmt).dequantize(), want)


def test_bits_per_weight_counts_every_stored_tensor_but_the_bias(fmt):
    tensors = random_tensors(fmt)
    bits = 8 * sum(t.nbytes for name, t in tensors.items() if name != "bias")
    assert RosaqLinear.from_tensors(tensors, fmt).bits_per_weight == bits / (24 * 128)


# --- one copy, and every way in and out ---------------------------------------------------------------------------


def storages(linear):
    """Bytes of all distinct storages that the module holds, in any attribute."""
    held = [t for t in (*linear.parameters(), *linear.buffers()) if t is not None]
    held += [value for value in vars(linear).values() if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def test_one_copy_is_held_in_memory(fmt):
    tensors = random_tensors(fmt, n=256, k=1024 if not fmt.rotation_blocks > 1 else 128)
    linear = RosaqLinear.from_tensors(tensors, fmt)
    assert all(getattr(linear, name) is None for name in PACKED_NAMES)
    stored = sum(t.nbytes for t in tensors.values())
    # Packing may pad and may widen the zero points; a second copy would come near twice the bytes.
    assert storages(linear) <= 1.3 * stored + 4096


MEASURE = """
import re, torch, rosaq
from rosaq.config import LinearFormat
from rosaq.linear import RosaqLinear

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

def layer():
    n = k = 2048
    return RosaqLinear.from_tensors({
        "qweight": torch.randint(-2**31, 2**31 - 1, (n, k // 8), dtype=torch.int32),
        "scales": torch.ones(n, k // 64, dtype=torch.float16),
        "zeros": torch.full((n, k // 64), 8, dtype=torch.uint8),
    }, LinearFormat(4, 64))

warm = layer()(torch.randn(1, 2048))
before = resident()
layers = [layer() for _ in range(16)]
held = resident() - before
print(held / sum(t.nbytes for x in layers for t in x.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_process_holds_one_copy():
    # Freed blocks go back to the system at once, so that what is resident is what is held.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True, env=env)
    assert float(done.stdout) < 1.2


def test_state_dict_is_the_disk_layout(fmt):
    tensors = random_tensors(fmt)
    linear = RosaqLinear.from_tensors(tensors, fmt)
    assert_same_tensors(linear.state_dict(), tensors)
    linear.unpack()
    assert_same_tensors(linear.state_dict(), tensors)


def test_state_dict_loads_into_a_fresh_and_into_a_packed_module(fmt):
    first, second = random_tensors(fmt, seed=0), random_tensors(fmt, seed=1)
    linear = RosaqLinear(128, 24, fmt, bias=True)
    for tensors in (first, second):
        linear.load_state_dict(tensors)
        assert linear.packed is not None
        assert_same_tensors(linear.state_dict(), tensors)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(fmt, copied):
    tensors = random_tensors(fmt)
    linear = RosaqLinear.from_tensors(tensors, fmt)
    other = copied(linear)
    x = torch.randn(3, 128)
    assert torch.equal(other(x), linear(x))
    other.load_state_dict(random_tensors(fmt, seed=1))
    assert_same_tensors(linear.state_dict(), tensors)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_the_module_keeps_the_storage_dtypes(fmt, cast):
    tensors = random_tensors(fmt)
    linear = RosaqLinear.from_tensors(tensors, fmt)
    assert_same_tensors(getattr(linear, cast)().state_dict(), tensors)
    linear.unpack()
    assert_same_tensors(getattr(linear, cast)().state_dict(), tensors)


def test_moving_to_meta_and_back_needs_a_load(fmt):
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt).to("meta")
    assert linear.packed is None
    with pytest.raises(ValueError, match="qweight: got no values"):
        linear.check("layer")
    linear.to_empty(device="cpu").load_state_dict(random_tensors(fmt))
    assert_same_tensors(linear.state_dict(), random_tensors(fmt))


def test_nothing_is_trainable(fmt):
    linear = RosaqLinear(128, 24, fmt, bias=True)
    assert not any(p.requires_grad for p in linear.parameters())
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt)
    assert not any(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_through_to_the_input(fmt, dtype):
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt)
    x = torch.randn(3, 5, linear.in_features, dtype=dtype, requires_grad=True)
    y = linear(x)
    assert torch.equal(y, linear(x.detach()))
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert gradient.dtype == dtype
    assert_close_in(gradient, direction.double() @ linear.dequantize().double(), dtype)
    assert not linear(x.detach()).requires_grad


def test_hooks_around_the_module_run_once_whether_it_has_a_gradient_or_not(fmt):
    """As accelerate and tensor parallelism do it: another forward in place of the class's."""
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt)
    inner, x = linear.forward, torch.randn(3, linear.in_features)
    linear.forward = lambda x: 2 * inner(x)
    want = linear(x)
    leaf = x.clone().requires_grad_()
    assert torch.equal(linear(leaf), want)
    (gradient,) = torch.autograd.grad(linear(leaf).sum(), leaf)
    assert_close_in(gradient, 2 * linear.dequantize().double().sum(0).expand(3, -1), torch.float32)


def test_a_functional_call_computes_with_the_tensors_that_it_is_given(fmt):
    one, other = (RosaqLinear.from_tensors(random_tensors(fmt, seed=seed), fmt) for seed in (0, 1))
    x = torch.randn(3, one.in_features)
    want, own = other(x), one(x)
    assert torch.equal(torch.func.functional_call(one, other.state_dict(), x), want)
    assert torch.equal(one(x), own)
    assert one.qweight is None


def test_a_weight_that_is_away_is_no_weight(fmt):
    linear = RosaqLinear(128, 24, fmt, device="meta")
    with pytest.raises(ValueError, match="qweight: got a tensor on the meta device, need it here"):
        linear.dequantize()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1, 2], r"salient_index: got \[1, 2\], need an int64 tensor"),
        (torch.tensor([1, 500]), r"Linear.salient_index: got 2 different channels from 1 to 500, need 2 in \[0, 128\)"),
        (torch.tensor([-1, 4]), "got 2 different channels from -1 to 4"),
        (torch.tensor([7, 7]), "got 1 different channels"),
        (torch.tensor([1.0]), "need an int64 tensor"),
    ],
)
def test_channels_that_are_none_are_refused(index, message):
    with pytest.raises(ValueError, match=message):
        RosaqLinear.from_linear(nn.Linear(128, 24), None, QuantSpec(method="rtn"), salient_index=index)


@pytest.mark.parametrize("packed_first", [True, False])
def test_first_call_packs_and_compiles_whole(packed_first):
    fmt = FORMATS["int3-index"]
    linear = RosaqLinear.from_tensors(random_tensors(fmt), fmt)
    want = linear(x := torch.randn(3, 128))
    if not packed_first:
        linear.unpack()
        assert torch.equal(linear(x), want)
        assert linear.packed is not None
    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), want)


# --- from a dense layer ---------------------------------------------------------------------------------------------


def test_from_linear_rounds_to_nearest_without_calibration():
    dense = nn.Linear(128, 24)
    linear = RosaqLinear.from_linear(dense, spec=QuantSpec(4, 32, method="rtn"))
    assert torch.equal(linear.bias, dense.bias.half())
    error = (linear.dequantize() - dense.weight).norm() / dense.weight.norm()
    assert error < 2 ** -(4 - 1)


def test_from_linear_needs_second_moments_for_gptq():
    with pytest.raises(ValueError, match="gram"):
        RosaqLinear.from_linear(nn.Linear(128, 24), spec=QuantSpec(4, 32, method="gptq"))


def test_from_linear_keeps_salient_columns():
    dense = nn.Linear(128, 24, bias=False)
    index = torch.tensor([3, 77])
    linear = RosaqLinear.from_linear(dense, spec=QuantSpec(3, 64, method="rtn"), salient_index=index)
    assert torch.equal(linear.dequantize()[:, index], dense.weight[:, index].half().float())


# --- refusals -------------------------------------------------------------------------------------------------------


def spoil(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def put(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), r"mlp.up.scales: got no values, need float16 \[24, 2\]"),
        (lambda t: t.pop("qweight"), "mlp.up.qweight: got no such tensor"),
        (spoil("scales", put(torch.nan)), "mlp.up.scales: got 1 NaN or Inf of 48"),
        (spoil("salient_weight", put(torch.inf)), "mlp.up.salient_weight: got 1 NaN or Inf"),
        (spoil("scales", torch.Tensor.float), "mlp.up.scales: got float32"),
        (spoil("zeros", lambda t: t[:, :1]), r"mlp.up.zeros: got uint8 \[24, 1\], need uint8 \[24, 2\]"),
        (spoil("salient_index", put(128)), r"salient_index: got .* to 128, need 8 in \[0, 128\)"),
        (spoil("salient_index", put(-1)), "salient_index: got 8 different channels from -1"),
        (lambda t: t["salient_index"].fill_(5), "salient_index: got 1 different channels from 5 to 5"),
        (lambda t: t.update(g_idx=torch.zeros(1)), r"got tensors \['g_idx'\], need only"),
    ],
)
def test_unsound_tensors_are_refused_by_name(change, message):
    fmt = FORMATS["int3-index"]
    tensors = random_tensors(fmt)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        RosaqLinear.from_tensors(tensors, fmt, name="mlp.up")


def test_module_that_was_never_loaded_does_not_run():
    with pytest.raises(ValueError, match="scales: got 48 NaN"):
        RosaqLinear(128, 24, FORMATS["int3-index"])(torch.randn(1, 128))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((100, 24), "in_features: got 100"), ((128, 20), "out_features: got 20"), ((96, 24), "group_size: got 64")],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        RosaqLinear(*sizes, LinearFormat(3, 64))


def test_repr_tells_the_format():
    text = repr(RosaqLinear(128, 24, FORMATS["int4-own-rotations-index"], device="meta"))
    for part in ("in_features=128, out_features=24, bits=4", "salient=4 (index)", "rotation=4x32", "bias=False"):
        assert part in text


@pytest.mark.parametrize(
    ("device", "has_cuda", "capability", "message"),
    [
        ("mps", False, None, "got mps, need cpu or cuda"),
        ("cuda", False, None, "built without CUDA; with nvcc on this machine, ROSAQ_BUILD=cuda pip install"),
        ("cuda", True, (7, 5), r"got Old GPU \(sm_75\), need sm_80 or newer, or device_map='cpu'"),
    ],
)
def test_device_without_kernels_is_refused_with_what_to_do(monkeypatch, device, has_cuda, capability, message):
    monkeypatch.setattr("rosaq.ops._C", SimpleNamespace(build_info=lambda: {"cuda": has_cuda}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    with pytest.raises(RuntimeError, match=message):
        check_device(torch.device(device))


def test_device_with_kernels_is_accepted(monkeypatch):
    check_device(torch.device("cpu"))
    monkeypatch.setattr("rosaq.ops._C", SimpleNamespace(build_info=lambda: {"cuda": True}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_device(torch.device("cuda"))
