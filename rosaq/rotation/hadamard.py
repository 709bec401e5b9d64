"""Hadamard matrices, by construction: Sylvester, Paley I and II over prime fields, and Kronecker products of these.

A size without a construction here is refused, never padded: padding and truncating is not a rotation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q [q, q] with Q[i, j] = Legendre symbol of (i - j) modulo the odd prime q."""
    legendre = torch.full((q,), -1.0, dtype=torch.float64)
    legendre[(torch.arange(1, q) ** 2) % q] = 1.0
    legendre[0] = 0.0
    index = torch.arange(q)
    return legendre[(index[:, None] - index[None, :]) % q]


def _paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime q = 3 mod 4: I + S with the skew S bordering Jacobsthal's matrix."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1) for a prime q = 1 mod 4: a symmetric conference matrix with its zeros and signs expanded."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = conference[1:, 0] = 1.0
    conference[1:, 1:] = _jacobsthal(q)
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, sign) + torch.kron(torch.eye(q + 1, dtype=torch.float64), zero)


@lru_cache(maxsize=64)
def _factors(n: int) -> tuple[tuple[str, int], ...] | None:
    """Constructions whose Kronecker product has order n, largest Sylvester part first; None if there is none."""
    if n == 1:
        return ()
    if n == 2:
        return (("sylvester", 2),)
    if n % 4:
        return None
    if n & (n - 1) == 0:
        return (("sylvester", 2), *(_factors(n // 2) or ()))
    if n - 1 > 2 and (n - 1) % 4 == 3 and _is_prime(n - 1):
        return (("paley1", n - 1),)
    if (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return (("paley2", n // 2 - 1),)
    for divisor in range(2, int(n**0.5) + 1):
        if n % divisor == 0:
            left, right = _factors(divisor), _factors(n // divisor)
            if left and right:
                return left + right
    return None


def has_hadamard(n: int) -> bool:
    """True when `hadamard(n)` can be constructed."""
    return n >= 1 and _factors(n) is not None


def hadamard(n: int) -> Tensor:
    """H [n, n] float64 of +-1 with H Hᵀ = n I (not symmetric in general); ValueError if no construction is known."""
    factors = _factors(n) if n >= 1 else None
    if factors is None:
        raise ValueError(
            f"hadamard: got size {n}, need a product of powers of 2 and Paley orders (12, 20, 28, 36, ...)"
        )
    make = {"paley1": _paley_one, "paley2": _paley_two}
    result = torch.ones(1, 1, dtype=torch.float64)
    for kind, q in factors:
        factor = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() if kind == "sylvester" else make[kind](q)
        result = torch.kron(result, factor)
    return result
