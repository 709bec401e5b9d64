"""Is a checkpoint what it says it is? Files, config, tensors, numbers, and what a sample of its linears computes."""

from rosaq.verification.checks import Check, Verdict, verify

__all__ = ["Check", "Verdict", "verify"]
