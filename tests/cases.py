"""Inputs for the op tests: a table of options, cases that cover every pair of them, and the tensors of one case."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rosaq import ops, reference
from rosaq.config import LinearFormat
from rosaq.layout import dequantize, zero_bytes

# Every option of fused_gemm. k = 384 divides by all group sizes and rotation sizes below.
OPTIONS: dict[str, list[Any]] = {
    "m": [0, 1, 2, 3, 5, 12, 13, 64, 65, 170],
    "n": [8, 40, 64, 128],
    "k": [384],
    "bits": [3, 4],
    "group_size": [32, 64, 96, 128, -1],
    "symmetric": [True, False],
    "salient": ["none", "index", "basis"],
    "r": [1, 4, 33],
    "rotation": ["none", "block-16", "block-48", "block-128", "shared-32", "shared-24", "dense"],
    "bias": ["none", "float16", "bfloat16", "float32"],
    "scale_dtype": ["float16", "bfloat16"],
    "x_dtype": ["float32", "float16", "bfloat16"],
    "x_layout": ["plain", "strided", "transposed", "3d"],
}
# The same for the CUDA kernels: 16-bit x, groups of 32, 64, 128 and k, rotations in multiples of 16. m ends each of the
# four token tiles; n = 136 and 264 end in the middle of a block of rows; k that does so has a test of its own.
CUDA_OPTIONS: dict[str, list[Any]] = OPTIONS | {
    "m": [1, 2, 8, 9, 16, 17, 32, 33, 64],
    "n": [8, 128, 136, 264],
    "k": [384],
    "group_size": [32, 64, 128, -1],
    "r": [1, 8, 33],
    "rotation": ["none", "block-16", "block-48", "block-128", "shared-32", "dense"],
    "x_dtype": ["float16", "bfloat16"],
    "x_layout": ["plain"],
}
Case = dict[str, Any]
Options = dict[str, list[Any]]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    """All (option, value, option, value) of one case."""
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(OPTIONS, 2)}


def case_id(case: Case) -> str:
    """Name of a case in a test report."""
    return "-".join(str(case[name]) for name in OPTIONS)


def all_pairs(options: Options = OPTIONS) -> set[tuple[Any, ...]]:
    """Every pair of values of every two options."""
    return {(a, va, b, vb) for a, b in itertools.combinations(options, 2) for va in options[a] for vb in options[b]}


def pairwise_cases(options: Options = OPTIONS, seed: int = 0, candidates: int = 12) -> list[Case]:
    """Cases that cover all pairs: fill an uncovered pair up at random a few times, keep the best."""
    rng = random.Random(seed)
    missing = all_pairs(options)
    cases = []
    while missing:
        a, va, b, vb = min(missing, key=repr)
        fillings = [
            {name: rng.choice(values) for name, values in options.items()} | {a: va, b: vb} for _ in range(candidates)
        ]
        best = max(fillings, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


@dataclass
class Linear:
    """The tensors of one quantised linear, and what fused_gemm needs beside x."""

    fmt: LinearFormat
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    extras: dict[str, Tensor | None]  # salient_weight, salient_index, salient_basis, rotation, bias

    @property
    def n(self) -> int:
        return self.qweight.size(0)

    @property
    def k(self) -> int:
        return self.qweight.size(1) // self.fmt.bits * 32

    def int_args(self) -> dict[str, Any]:
        """The keyword arguments that repeat what was packed."""
        fmt = self.fmt
        return {"out_features": self.n, "bits": fmt.bits, "group_size": fmt.group_size, "symmetric": fmt.symmetric}

    def packed(self) -> Tensor:
        return ops.prepack(self.qweight, self.scales, self.zeros, self.fmt.bits)

    def run(self, x: Tensor, packed: Tensor | None = None) -> Tensor:
        """fused_gemm of x."""
        return ops.fused_gemm(x, self.packed() if packed is None else packed, **self.extras, **self.int_args())

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [n, k]."""
        return dequantize(self.qweight, self.scales, self.zeros, self.fmt.bits, dtype)

    def expected(self, x: Tensor) -> Tensor:
        """y in float64, by the definition."""
        return reference.fused_gemm(x, self.qweight, self.scales, self.zeros, self.fmt.bits, **self.extras)

    def plain(self, x: Tensor) -> Tensor:
        """What a PyTorch user would write: the same equation in x's dtype."""
        dtype, extras = (
            x.dtype,
            {name: t.to(x.dtype) for name, t in self.extras.items() if t is not None and t.is_floating_point()},
        )
        t = x
        if "rotation" in extras:
            b = extras["rotation"].size(-1)
            t = (x.unflatten(-1, (-1, 1, b)) @ extras["rotation"]).flatten(-3)
        y = functional.linear(t, self.dequantized().to(dtype), extras.get("bias"))
        if "salient_weight" in extras:
            index = self.extras["salient_index"]
            s = t @ extras["salient_basis"] if index is None else t[..., index]
            y = y + functional.linear(s, extras["salient_weight"])
        return y


def make_linear(
    n: int, k: int, bits: int = 4, group_size: int = 32, symmetric: bool = True, scale_dtype: str = "float16"
) -> Linear:
    """A random weight without salient part, rotation or bias; values of about 1 / sqrt(k)."""
    groups = 1 if group_size == -1 else k // group_size
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = ((torch.rand(n, groups) + 0.5) / (2**bits * k**0.5)).to(getattr(torch, scale_dtype))
    zeros = None if symmetric else zero_bytes(torch.randint(0, 2 ** (bits + 1) - 1, (n, groups)) / 2)
    if symmetric:  # their scales have a sign, which puts the extra level above or below zero
        scales = scales * (torch.randint(0, 2, (n, groups)) * 2 - 1)
    names = ("salient_weight", "salient_index", "salient_basis", "rotation", "bias")
    fmt = LinearFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    return Linear(fmt, ops.pack(codes, bits), scales, zeros, dict.fromkeys(names))


def random_rotation(blocks: int, b: int) -> Tensor:
    """float16 [blocks, b, b], each orthogonal up to its rounding."""
    return torch.linalg.qr(torch.randn(blocks, b, b)).Q.half()


def build(case: Case) -> tuple[Linear, Tensor]:
    """The linear and x of one case."""
    n, k, r = case["n"], case["k"], case["r"]
    linear = make_linear(n, k, case["bits"], case["group_size"], case["symmetric"], case["scale_dtype"])
    scale = getattr(torch, case["scale_dtype"])
    if case["salient"] != "none":
        linear.extras["salient_weight"] = (torch.randn(n, r) / k**0.5).to(scale)
    if case["salient"] == "index":
        linear.extras["salient_index"] = torch.randperm(k)[:r].int()
    if case["salient"] == "basis":
        linear.extras["salient_basis"] = torch.linalg.qr(torch.randn(k, r)).Q.to(scale)
    if case["rotation"] != "none":
        kind, _, size = case["rotation"].partition("-")
        b = k if kind == "dense" else int(size)
        linear.extras["rotation"] = random_rotation(k // b if kind == "block" else 1, b)
    if case["bias"] != "none":
        linear.extras["bias"] = torch.randn(n).to(getattr(torch, case["bias"]))
    return linear, make_x(case["m"], k, case["x_dtype"], case["x_layout"])


def make_x(m: int, k: int, dtype: str = "float32", layout: str = "plain") -> Tensor:
    """Activations with a few channels 30 times the others, as models have them; some layouts are not contiguous."""
    size = torch.ones(k)
    size[torch.randperm(k)[:3]] = 30.0
    x = (torch.randn(m, k) * size).to(getattr(torch, dtype))
    if layout == "strided":
        return x.repeat_interleave(2, dim=0)[::2]
    if layout == "transposed":
        return x.T.contiguous().T
    return x.unflatten(0, (m, 1)) if layout == "3d" else x
