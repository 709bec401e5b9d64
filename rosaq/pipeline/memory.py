"""Give freed memory back to the system while a run goes on."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Return what was freed to the system. glibc keeps freed blocks of up to 32 MB, which is what most tensors of a run
    are. Other C libraries return memory by themselves, and what is freed on a GPU stays with torch, whose next tensors
    take it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
