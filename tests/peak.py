"""How many bytes of tensors are alive at once, counted by torch's dispatcher: exact, and the same on any system."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Under `with`: `peak` is the largest number of bytes that tensors made there held at one time. What an operation
    takes for itself is not seen (for an eigendecomposition two more matrices)."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._sizes = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            size = self._sizes[storage] = storage.nbytes()
            self._held += size
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._held -= size
