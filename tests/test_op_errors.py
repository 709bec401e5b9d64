"""What the ops refuse, and that the message names op, argument, what it got and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import make_linear
from torch import Tensor

from rosaq import _C, ops


def blob() -> Tensor:
    return make_linear(16, 64, 4, 32, symmetric=False).packed()


def changed(index: int, value: int) -> Tensor:
    """A blob with one header byte changed."""
    packed = blob()
    packed[index] = value
    return packed


GOOD: dict[str, Any] = {"out_features": 16, "bits": 4, "group_size": 32, "symmetric": False}
C = torch.zeros(16, 2).half()
INDEX = torch.zeros(2, dtype=torch.int32)
BASIS = torch.zeros(64, 2).half()

GEMM_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(1, 32)}, r"x: got shape \[1, 32\], need \[..., 64\]"),
    ({"x": torch.zeros(1, 64).double()}, "x: got dtype Double, need Half, BFloat16, Float"),
    ({"x": torch.tensor(1.0)}, r"x: got shape \[\]"),
    ({"packed": torch.zeros(10, dtype=torch.uint8)}, "packed: got 10 bytes, need at least the 64-byte header"),
    ({"packed": torch.zeros(1000, dtype=torch.uint8)}, "packed: got bytes that do not start with the rosaq mark"),
    ({"packed": blob().float()}, "packed: got dtype Float, need Byte"),
    ({"packed": blob().view(2, -1)}, "packed: got shape .*need a contiguous 1-D blob"),
    ({"packed": blob().repeat_interleave(2)[::2]}, "packed: .*not contiguous"),
    ({"packed": blob()[:-64]}, "packed: got 640 bytes, need 704 for n 16, k 64, 4 bits"),
    ({"packed": torch.cat([blob(), blob()])}, "packed: got 1408 bytes, need 704"),
    ({"packed": changed(8, 99)}, "packed: got layout version 99, need 2 .*prepack the weight again"),
    ({"packed": changed(12, 7)}, r"packed: got a damaged header \(bits 7"),
    ({"packed": changed(24, 0)}, r"packed: got a damaged header \(.*n 0"),
    ({"out_features": 24}, "out_features: got 24, need 16 as packed"),
    ({"bits": 3}, "bits: got 3, need 4 as packed"),
    ({"bits": 5}, "bits: got 5, need 3 or 4"),
    ({"group_size": 64}, "group_size: got 64, need 32 as packed"),
    ({"group_size": -1}, "group_size: got -1, need 32 as packed"),
    ({"symmetric": True}, "symmetric: got 1, need 0 as packed"),
    ({"salient_weight": C}, "salient_weight: got neither salient_index nor salient_basis, need exactly one"),
    (
        {"salient_weight": C, "salient_index": INDEX, "salient_basis": BASIS},
        "salient_weight: got both salient_index and salient_basis, need exactly one",
    ),
    ({"salient_index": INDEX}, "salient_weight: got none but a salient_index"),
    ({"salient_basis": BASIS}, "salient_weight: got none but a salient_basis"),
    ({"salient_weight": C.float(), "salient_index": INDEX}, "salient_weight: got dtype Float, need Half, BFloat16"),
    ({"salient_weight": C[:8], "salient_index": INDEX}, r"salient_weight: got shape \[8, 2\], need \[16, r\]"),
    ({"salient_weight": C, "salient_index": INDEX[:1]}, r"salient_index: got shape \[1\], need \[2\]"),
    ({"salient_weight": C, "salient_index": INDEX.long()}, "salient_index: got dtype Long, need Int"),
    ({"salient_weight": C, "salient_index": INDEX + 64}, r"salient_index: got 64 at \[0\], need 0 to 63"),
    ({"salient_weight": C, "salient_index": INDEX - 1}, r"salient_index: got -1 at \[0\], need 0 to 63"),
    ({"salient_weight": C, "salient_basis": BASIS.T}, r"salient_basis: got shape \[2, 64\], need \[64, 2\]"),
    ({"rotation": torch.eye(64).half()}, r"rotation: got shape \[64, 64\], need \[B, b, b\] with b dividing 64"),
    ({"rotation": torch.zeros(3, 16, 16).half()}, r"rotation: got shape \[3, 16, 16\]"),
    ({"rotation": torch.zeros(1, 48, 48).half()}, r"rotation: got shape \[1, 48, 48\]"),
    ({"rotation": torch.zeros(0, 64, 64).half()}, r"rotation: got shape \[0, 64, 64\]"),
    ({"rotation": torch.zeros(1, 64, 64)}, "rotation: got dtype Float, need Half, BFloat16"),
    ({"bias": torch.zeros(8)}, r"bias: got shape \[8\], need \[16\]"),
    ({"bias": torch.zeros(16).double()}, "bias: got dtype Double"),
]


@pytest.mark.parametrize(("changes", "message"), GEMM_REFUSALS, ids=[message[:40] for _, message in GEMM_REFUSALS])
def test_fused_gemm_refuses(changes: dict[str, Any], message: str) -> None:
    args = {"x": torch.zeros(1, 64), "packed": blob(), **GOOD} | changes
    with pytest.raises(RuntimeError, match="rosaq::fused_gemm: " + message):
        ops.fused_gemm(**args)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


PREPACK_REFUSALS: list[tuple[tuple[Any, ...], str]] = [
    ((ints(16, 8), torch.ones(16, 2).half(), None, 2), "bits: got 2, need 3 or 4"),
    ((ints(16, 8).long(), torch.ones(16, 2).half(), None, 4), "qweight: got dtype Long, need Int"),
    ((ints(16), torch.ones(16, 2).half(), None, 4), r"qweight: got shape \[16\], need \[n, k \* bits / 32\]"),
    ((ints(12, 8), torch.ones(12, 2).half(), None, 4), "qweight: got 12 rows, need a positive multiple of 8"),
    ((ints(16, 7), torch.ones(16, 2).half(), None, 4), "qweight: got 7 words per row, need a positive multiple of 4"),
    ((ints(16, 8), torch.ones(16, 2), None, 4), "scales: got dtype Float, need Half, BFloat16"),
    ((ints(16, 8), torch.ones(8, 2).half(), None, 4), r"scales: got shape \[8, 2\], need \[16, k / group_size\]"),
    ((ints(16, 8), torch.ones(16, 3).half(), None, 4), "scales: got 3 groups for k 64"),
    ((ints(16, 8), torch.ones(16, 4).half(), None, 4), "scales: got 4 groups for k 64, need a group size"),
    ((ints(16, 8), torch.ones(16, 2).half(), ints(16, 2), 4), "zeros: got dtype Int, need Byte"),
    ((ints(16, 8), torch.ones(16, 2).half(), ints(16, 1).byte(), 4), r"zeros: got shape \[16, 1\], need \[16, 2\]"),
]


@pytest.mark.parametrize(("args", "message"), PREPACK_REFUSALS, ids=[message[:40] for _, message in PREPACK_REFUSALS])
def test_prepack_refuses(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match="rosaq::prepack: " + message):
        ops.prepack(*args)


def test_pack_and_unpack_refuse() -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    codes[1, 3] = 8
    with pytest.raises(RuntimeError, match=r"rosaq::pack: codes: got 8 at \[1, 3\], need 0 to 7"):
        ops.pack(codes, 3)
    with pytest.raises(RuntimeError, match=r"rosaq::pack: codes: got shape \[2, 33\], need \[n, k\]"):
        ops.pack(torch.zeros(2, 33, dtype=torch.uint8), 3)
    with pytest.raises(RuntimeError, match="rosaq::pack: codes: got dtype Int, need Byte"):
        ops.pack(ints(2, 32), 3)
    with pytest.raises(RuntimeError, match=r"rosaq::unpack: qweight: got shape \[2, 4\]"):
        ops.unpack(ints(2, 4), 3)
    with pytest.raises(RuntimeError, match="rosaq::unpack: bits: got 8, need 3 or 4"):
        ops.unpack(ints(2, 8), 8)


def test_unprepack_refuses_another_tensor_and_tracing() -> None:
    with pytest.raises(RuntimeError, match="rosaq::unprepack: packed: got bytes that do not start with the rosaq mark"):
        ops.unprepack(torch.zeros(256, dtype=torch.uint8))
    with pytest.raises(Exception, match="cannot be traced"):
        torch.compile(ops.unprepack, fullgraph=True, backend="eager")(blob())


def test_fakes_refuse_the_same_shapes() -> None:
    with torch.device("meta"):
        x, packed = torch.zeros(1, 64), torch.zeros(704, dtype=torch.uint8)
    assert ops.fused_gemm(x, packed, **GOOD).shape == (1, 16)
    with pytest.raises(RuntimeError, match="rosaq::fused_gemm: bits: got 5"):
        ops.fused_gemm(x, packed, **GOOD | {"bits": 5})
    with pytest.raises(RuntimeError, match="rosaq::fused_gemm: bias: got float32"):
        ops.fused_gemm(x, packed, bias=torch.zeros(8, device="meta"), **GOOD)


def test_an_unknown_isa_in_the_environment_is_refused_at_the_first_use() -> None:
    code = "import torch; from rosaq import ops; ops.fused_gemm(torch.ones(1, 32), ops.prepack("
    code += "torch.ones(8, 4, dtype=torch.int32), torch.ones(8, 1).half(), None, 4), out_features=8, bits=4, "
    code += "group_size=32, symmetric=True)"
    env = os.environ | {"ROSAQ_CPU_ISA": "avx9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ROSAQ_CPU_ISA: got 'avx9', this machine and build have: portable" in done.stderr


def test_errors_carry_no_path_of_the_build_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.unpack(ints(2, 4), 3)
    assert " csrc/torch/pack_args.cpp:" in str(caught.value)


def test_an_unknown_isa_is_refused_with_what_there_is(restore_isa: None) -> None:  # noqa: ARG001
    with pytest.raises(ValueError, match="set_isa: name: got 'avx9', this machine and build have: portable"):
        _C.set_isa("avx9")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((12, 64, 4, 32, True), "n: got 12, need a positive multiple of 8"),
        ((8, 48, 4, 32, True), "k: got 48, need a positive multiple of 32"),
        ((8, 64, 5, 32, True), "bits: got 5, need 3 or 4"),
        ((8, 64, 4, 48, True), "group_size: got 48, need a multiple of 32 that divides k 64"),
    ],
)
def test_packed_bytes_refuses(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.packed_bytes(*args)
