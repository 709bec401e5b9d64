"""What the wrappers of csrc/device/ptx*.cuh must do, read from the PTX ISA a second time, in numpy.

Each case has random inputs and the outputs that the ISA asks for, as uint32 words. The same kernels run under the
emulator and on a GPU; test_conformance.py compares the three, and with what GPUs gave before.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tests.gpu.conformance_numbers import fma, from_16, rounded, to_16

Words = npt.NDArray[np.uint32]
Generator = np.random.Generator


@dataclass(frozen=True)
class Case:
    """`inputs` makes the words from a seeded generator, `expected` the outputs. `covers`: wrappers and CUDA words."""

    covers: tuple[str, ...]
    inputs: Callable[[Generator], Words]
    expected: Callable[[Words], Words]
    is_exact: bool = True  # else float32 sums, compared by test_conformance.py
    needs_sm: int = 80
    only_sm: bool = False  # on no later one either: instructions of sm_90a end with it

    def make(self, name: str) -> tuple[Words, Words]:
        words = self.inputs(np.random.default_rng(zlib.crc32(name.encode())))
        return words, self.expected(words)


def words(count: int) -> Callable[[Generator], Words]:
    return lambda random: random.integers(0, 2**32, count, dtype=np.uint32)


def cp_async(given: Words) -> Words:
    data = given[4:580].copy()
    skips = [t for t in range(32) if given[0] >> np.uint32(t) & 1]
    for start, size in ((256, 4), (448, 2), (544, 1)):
        for t in skips:
            data[start + t * size : start + (t + 1) * size] = 0
    return data


def ldmatrix_inputs(random: Generator) -> Words:
    return np.concatenate([words(128)(random), random.permutation(32).astype(np.uint32)])


def ldmatrix(given: Words) -> Words:
    """Register i of lane l: row l // 4, columns 2 (l % 4) and next, of the matrix whose rows lanes 8 i + 0..7 name."""
    rows = given[:128].view(np.uint16).reshape(32, 8)[given[128:]]  # by lane
    out = np.zeros((32, 12), np.uint32)
    for slot, (count, is_transposed) in enumerate([(4, False), (4, True), (2, False), (2, True)]):
        for i in range(count):
            matrix = rows[8 * i : 8 * i + 8]
            pairs = np.ascontiguousarray(matrix.T if is_transposed else matrix).view(np.uint32)  # [row, pair]
            out[:, (0, 4, 8, 10)[slot] + i] = pairs.reshape(32)
    return out.reshape(-1)


def mma_inputs(
    is_bf16: bool, draw: Callable[[Generator, int], npt.NDArray[np.float64]]
) -> Callable[[Generator], Words]:
    def make(random: Generator) -> Words:
        fragments = to_16(draw(random, 32 * 12), is_bf16).view(np.uint32).reshape(32, 6)
        sums = draw(random, 32 * 4).astype(np.float32).view(np.uint32).reshape(32, 4)
        return np.concatenate([fragments, sums], axis=1).reshape(-1)

    return make


def mma(is_bf16: bool) -> Callable[[Words], Words]:
    def expected(given: Words) -> Words:
        """Fragments as in the figures of the ISA: lane = 4 * group + member."""
        lanes = given.reshape(32, 10)
        a, b, d = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for lane in range(32):
            group, member = divmod(lane, 4)
            halves = from_16(np.ascontiguousarray(lanes[lane, :6]).view(np.uint16), is_bf16)
            for i in range(8):  # a0 .. a7
                row = group + (8 if i in (2, 3, 6, 7) else 0)
                a[row, member * 2 + (i & 1) + (8 if i >= 4 else 0)] = halves[i]
            for i in range(4):  # b0 .. b3
                b[member * 2 + (i & 1) + (8 if i >= 2 else 0), group] = halves[8 + i]
            for i in range(4):  # c0 .. c3
                d[group + (8 if i >= 2 else 0), member * 2 + (i & 1)] = lanes[lane, 6 + i : 7 + i].view(np.float32)[0]
        out = np.zeros((32, 8), np.float32)
        for first, total in ((0, d + a @ b), (4, a @ b)):
            for lane in range(32):
                group, member = divmod(lane, 4)
                rows = total[[group, group + 8], member * 2 : member * 2 + 2]
                out[lane, first : first + 4] = rows.reshape(4)
        return out.reshape(-1).view(np.uint32)

    return expected


def wgmma_inputs(
    is_bf16: bool, draw: Callable[[Generator, int], npt.NDArray[np.float64]], scale: float
) -> Callable[[Generator], Words]:
    def make(random: Generator) -> Words:
        a = to_16(draw(random, 128 * 16), is_bf16).view(np.uint32)
        b = to_16(draw(random, 2 * 64 * 16) * scale, is_bf16).view(np.uint32)
        return np.concatenate([a, b, draw(random, 128 * 16).astype(np.float32).view(np.uint32)])

    return make


def wgmma(is_bf16: bool) -> Callable[[Words], Words]:
    def expected(given: Words) -> Words:
        """Figures of wgmma.m64nNk16: row 16 warp + group (+ 8), where lane = 4 * group + member."""
        thread, i = np.arange(128)[:, None], np.arange(8)[None]
        row = thread // 32 * 16 + thread % 32 // 4 + np.where(i // 2 % 2 == 1, 8, 0)
        column = thread % 4 * 2 + i % 2 + np.where(i >= 4, 8, 0)
        a = np.zeros((2, 64, 16))
        halves = from_16(given[:1024].view(np.uint16), is_bf16).reshape(128, 2, 8)  # a0 .. a7
        for step in range(2):
            a[step, row, column] = halves[:, step]
        b = from_16(given[1024:2048].view(np.uint16), is_bf16).reshape(2, 64, 16)
        products = a[0] @ b[0].T + a[1] @ b[1].T, a[1] @ b[1, 32:].T
        out = []
        for product, sums in zip(products, (None, given[2048:].view(np.float32).reshape(128, 16)), strict=True):
            i = np.arange(product.shape[1] // 2)[None]  # d0 and on
            row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
            column = i // 4 * 8 + thread % 4 * 2 + i % 2
            out.append(product[row, column] + (0 if sums is None else sums))
        return np.concatenate(out, axis=1).astype(np.float32).reshape(-1).view(np.uint32)

    return expected


def registers(given: Words) -> Words:
    kept = given.reshape(128, 8) * np.uint32(3) + np.arange(8, dtype=np.uint32)
    return (kept ^ np.roll(kept, -1, axis=1)).reshape(-1)


def integers(random: Generator, count: int) -> npt.NDArray[np.float64]:
    return random.integers(-8, 9, count).astype(np.float64)


def normals(random: Generator, count: int) -> npt.NDArray[np.float64]:
    return random.standard_normal(count)


def bits(given: Words) -> Words:
    out = np.zeros((256, 7), np.uint32)
    for row, (a, b, c) in zip(out, given.reshape(256, 3).tolist(), strict=True):
        row[0] = (a & b) | c
        row[1] = (a & b) ^ c
        row[2] = a ^ b ^ c
        row[3] = (a & b) | (~a & c & 0xFFFFFFFF)
        row[4] = ~(a | b | c) & 0xFFFFFFFF
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        chosen = [source[c >> 4 * i & 7] for i in range(4)]
        signs = [c >> 4 * i & 8 for i in range(4)]
        spread = [(0xFF if byte & 0x80 else 0) if sign else byte for byte, sign in zip(chosen, signs, strict=True)]
        row[5] = int.from_bytes(bytes(spread), "little")
        row[6] = a
    return out.reshape(-1)


def pair_inputs(is_bf16: bool) -> Callable[[Generator], Words]:
    def make(random: Generator) -> Words:
        """A third any bits, a third ordinary numbers, a third where the sum nearly cancels or rounds at a tie."""
        values = random.integers(0, 2**16, (256, 3, 2), dtype=np.uint16)
        ordinary = to_16(random.standard_normal((170, 3, 2)), is_bf16)
        values[86:] = ordinary
        product = from_16(values[171:, 0], is_bf16) * from_16(values[171:, 1], is_bf16)
        values[171:, 2] = to_16(-product, is_bf16) ^ random.integers(0, 2, (85, 2), dtype=np.uint16)
        return values.reshape(256, 6).view(np.uint32).reshape(-1)

    return make


def pair(is_bf16: bool) -> Callable[[Words], Words]:
    one, minus_zero = (0x3F80 if is_bf16 else 0x3C00), 0x8000

    def expected(given: Words) -> Words:
        out = np.zeros((256, 4, 2), np.uint16)
        for i, (a, b, c) in enumerate(given.view(np.uint16).reshape(256, 3, 2).tolist()):
            for half in range(2):
                x, y, z = a[half], b[half], c[half]
                out[i, 0, half] = fma(x, y, z, is_bf16)
                out[i, 1, half] = fma(x, one, y, is_bf16)
                out[i, 2, half] = fma(x, one, y ^ 0x8000, is_bf16)
                out[i, 3, half] = fma(x, y, minus_zero, is_bf16)
        return out.reshape(256, 8).view(np.uint32).reshape(-1)

    return expected


def round_inputs(random: Generator) -> Words:
    """Numbers of every size, half of them on or beside a tie of one of the formats."""
    given = random.integers(0, 2**32, 256, dtype=np.uint32)
    given[:64] = random.standard_normal(64).astype(np.float32).view(np.uint32)
    given[64:128] = given[64:128] & np.uint32(0xFFFF0000) | np.uint32(0x8000) + random.integers(-1, 2, 64).astype(
        np.uint32
    )
    near = random.standard_normal(64).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    given[128:192] = near | np.uint32(0x1000) + random.integers(-1, 2, 64).astype(np.uint32)
    return given


def round_floats(given: Words) -> Words:
    out = np.zeros(256, np.uint32)
    for i, value in enumerate(given.view(np.float32).astype(np.float64)):
        if np.isnan(value):
            halves = (0x7FFF, 0x7FFF)
        elif np.isinf(value):
            halves = tuple(infinity | (0x8000 if value < 0 else 0) for infinity in (0x7C00, 0x7F80))
        else:
            halves = tuple(rounded(Fraction(value), value, is_bf16) for is_bf16 in (False, True))
        out[i] = halves[0] | halves[1] << 16
    return out


def shuffle_inputs(random: Generator) -> Words:
    return np.stack([words(32)(random), random.integers(0, 32, 32, dtype=np.uint32)], axis=1).reshape(-1)


def shuffle(given: Words) -> Words:
    value, operand = given.reshape(32, 2).T
    out = np.zeros((32, 8), np.uint32)
    ballot = sum(int(operand[t] & 1) << t for t in range(32)) ^ 2
    for t in range(32):
        segment8, segment16 = t // 8 * 8, t // 16 * 16
        source = int(operand[t])
        out[t] = [
            value[source],
            value[segment8 + source % 8],
            value[t - 3 if t >= 3 else t],
            value[t - 3 if t - 3 >= segment16 else t],
            value[t + 5 if t + 5 < segment8 + 8 else t],
            value[t ^ 9],
            value[t ^ 17 if t ^ 17 < segment16 + 16 else t],
            ballot,
        ]
    return out.reshape(-1)


def message(given: Words) -> Words:
    own = given.reshape(4, 64, 4).sum(axis=2, dtype=np.uint32)
    sums = own.cumsum(axis=0, dtype=np.uint32).reshape(-1)
    return np.concatenate([sums, np.array([4, 6 + 4 * 16, 1, 1, 1, 1], np.uint32)])


def named_barrier(given: Words) -> Words:
    out = given.copy()
    for i in range(8):
        out[:64] = np.roll(out[:64], -33) * np.uint32(3) + np.uint32(i)
    return out


CP_ASYNC = tuple(
    f"cp_async_{n}" for n in ("16", "16_first", "16_zfill", "8", "8_zfill", "4", "4_zfill", "commit", "wait")
)
LDMATRIX = ("ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2", "ldmatrix_x2_trans")
MMA = ("mma_m16n8k16", "mma_m16n8k16_first")
PAIR = ("hfma2", "__hadd2", "__hsub2", "__hmul2")
SHUFFLES = tuple(f"__{n}_sync" for n in ("shfl", "shfl_up", "shfl_down", "shfl_xor", "ballot", "any", "all"))
GLOBAL = ("ld_acquire", "st_release", "red_add_release", "atom_add_acq_rel", "fence_acq_rel_gpu", "nanosleep")
WGMMA = ("wgmma_fence", "at", "wgmma_m64k16", "wgmma_commit", "wgmma_wait", "fence_proxy_async")
MBARRIER = tuple(f"mbarrier_{n}" for n in ("init", "arrive", "arrive_expect_tx", "try_wait_parity"))

CASES = {
    "cp_async": Case(CP_ASYNC, words(580), cp_async),
    "ldmatrix": Case(LDMATRIX, ldmatrix_inputs, ldmatrix),
    "mma_f16": Case(MMA, mma_inputs(False, normals), mma(False), is_exact=False),
    "mma_bf16": Case(MMA, mma_inputs(True, normals), mma(True), is_exact=False),
    # Integers leave nothing to round: whatever the order of the sums, the result is exact.
    "mma_f16_integers": Case(MMA, mma_inputs(False, integers), mma(False)),
    "mma_bf16_integers": Case(MMA, mma_inputs(True, integers), mma(True)),
    "bits": Case(("lop3", "prmt", "opaque"), words(768), bits),
    "pair_f16": Case(PAIR, pair_inputs(False), pair(False)),
    "pair_bf16": Case(PAIR, pair_inputs(True), pair(True)),
    "round": Case(("__float2half_rn", "__float2bfloat16_rn"), round_inputs, round_floats),
    "shuffle": Case(SHUFFLES, shuffle_inputs, shuffle),
    "message": Case((*GLOBAL, "ld_global_nc_16"), words(1024), message),
    "named_barrier": Case(("bar_sync",), words(96), named_barrier),
    "dependent_launch": Case(("griddep_launch", "griddep_wait"), words(64), lambda given: given),
    "bulk": Case(
        (*MBARRIER, "fence_mbarrier_init", "fence_proxy_async", "bulk_copy_g2s"),
        words(96),
        lambda given: given + np.uint32(1),
        needs_sm=90,
    ),
    # Half the size, since twice the terms of an mma have to meet its limit.
    "wgmma_f16": Case(
        WGMMA, wgmma_inputs(False, normals, 0.5), wgmma(False), is_exact=False, needs_sm=90, only_sm=True
    ),
    "wgmma_bf16": Case(WGMMA, wgmma_inputs(True, normals, 0.5), wgmma(True), is_exact=False, needs_sm=90, only_sm=True),
    "wgmma_f16_integers": Case(WGMMA, wgmma_inputs(False, integers, 1), wgmma(False), needs_sm=90, only_sm=True),
    "wgmma_bf16_integers": Case(WGMMA, wgmma_inputs(True, integers, 1), wgmma(True), needs_sm=90, only_sm=True),
    "registers": Case(("fewer_registers", "more_registers"), words(1024), registers, needs_sm=90, only_sm=True),
}
