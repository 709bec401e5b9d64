"""Give freed memory back to the system while a run goes on."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_freed_memory() -> None:
    """Free what only cycles refer to, and return what was freed to the system.

    Tuning leaves tensors in cycles, and the collector counts objects, not bytes. glibc keeps freed blocks of up to
    32 MB, which is what most tensors of a run are; other C libraries return memory by themselves.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
