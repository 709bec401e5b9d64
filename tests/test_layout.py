"""The disk layout against a ten-line numpy reading, and the packed layout's index maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosaq import _C, layout, ops


def read_codes(qweight: np.ndarray, bits: int) -> np.ndarray:
    """qweight int32 [n, words] -> codes [n, k]: what a reader without rosaq writes."""
    stream = np.unpackbits(qweight.astype("<i4").view(np.uint8), axis=1, bitorder="little")  # [n, k * bits]
    planes = stream.reshape(qweight.shape[0], -1, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(axis=2).astype(np.uint8)


@pytest.mark.parametrize("pack", [layout.pack, ops.pack], ids=["torch", "op"])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 96), (8, 1024), (0, 32), (2, 0), (2050, 32)])
@pytest.mark.parametrize("bits", [3, 4])
def test_pack_is_a_little_endian_bit_string(bits: int, n: int, k: int, pack: object) -> None:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    qweight = pack(codes, bits)  # type: ignore[operator]
    assert qweight.dtype == torch.int32
    assert tuple(qweight.shape) == (n, k * bits // 32)
    if n and k:
        assert np.array_equal(read_codes(qweight.numpy(), bits), codes.numpy())


@pytest.mark.parametrize("unpack", [layout.unpack, ops.unpack], ids=["torch", "op"])
@pytest.mark.parametrize("bits", [3, 4])
def test_unpack_inverts_any_words(bits: int, unpack: object) -> None:
    qweight = torch.randint(-(2**31), 2**31, (1500, 6 * bits), dtype=torch.int64).to(torch.int32)
    codes = unpack(qweight, bits)  # type: ignore[operator]
    assert np.array_equal(read_codes(qweight.numpy(), bits), codes.numpy())
    assert torch.equal(layout.pack(codes, bits), qweight)


def test_first_words_are_as_drawn() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101
    assert [word & 0xFFFFFFFF for word in layout.pack(codes, 3)[0].tolist()] == [0b01 << 30, 0b1, 0]


@pytest.mark.parametrize("bits", [3, 4])
def test_every_code_bit_of_a_packed_block_has_its_own_place(bits: int) -> None:
    places = [place for j in range(32) for place in _C.code_bits(bits, j)]
    assert sorted(places) == [(word, bit) for word in range(bits) for bit in range(32)]


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_blob_follows_the_index_map(bits: int) -> None:
    n, k, row, column, code = 24, 64, 17, 45, 2**bits - 2
    codes = torch.zeros(n, k, dtype=torch.uint8)
    codes[row, column] = code
    blob = ops.prepack(ops.pack(codes, bits), torch.zeros(n, 1).half(), None, bits)
    panel_bytes = (blob.numel() - _C.HEADER_BYTES) // 2
    panel = blob[_C.HEADER_BYTES + panel_bytes :]  # rows 16 to 31
    words = panel[64:].view(torch.int32).reshape(k // 32, bits, _C.PANEL_ROWS)  # after one line of scales
    want = torch.zeros_like(words)
    for i, (word, bit) in enumerate(_C.code_bits(bits, column % 32)):
        want[column // 32, word, row - 16] |= (code >> i & 1) << bit
    assert torch.equal(words, want)


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).unsqueeze(0).repeat(1, 2)  # two groups of 32
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 7]], dtype=torch.uint8)
    qweight = layout.pack(codes, 3)
    assert layout.dequantize(qweight, scales, zeros, 3)[0, [0, 1, 32, 39]].tolist() == [-1.5, -1.0, -14.0, 0.0]
    halves = torch.tensor([[128 + 3, 128 + 6]], dtype=torch.uint8)  # 3.5 and 6.5
    assert layout.dequantize(qweight, scales, halves, 3)[0, [0, 1, 32, 39]].tolist() == [-1.75, -1.25, -13.0, 1.0]
    assert layout.dequantize(qweight, scales, None, 3)[0, [0, 4, 32]].tolist() == [-2.0, 0.0, -8.0]


def test_every_byte_is_a_zero_point_of_its_own():
    every = torch.arange(256, dtype=torch.uint8)
    assert sorted(layout.zero_points(every).tolist()) == [half / 2 for half in range(256)]
    assert torch.equal(layout.zero_bytes(layout.zero_points(every)), every)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.pack(torch.zeros(1, 33, dtype=torch.uint8), 4), "codes: got shape .*multiple of 32"),
        (lambda: layout.pack(torch.full((1, 32), 8), 3), "codes: got 8 to 8, need 0 to 7"),
        (lambda: layout.pack(torch.zeros(1, 32), 5), "bits: got 5"),
        (lambda: layout.unpack(torch.zeros(1, 4, dtype=torch.int32), 3), "qweight: got torch.int32"),
        (lambda: layout.unpack(torch.zeros(1, 3), 3), "qweight: got torch.float32"),
        (
            lambda: layout.dequantize(torch.zeros(2, 4, dtype=torch.int32), torch.ones(3, 1), None, 4),
            "scales: got shape",
        ),
        (
            lambda: layout.dequantize(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 1), torch.ones(2, 2), 4),
            "zeros: got shape",
        ),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
