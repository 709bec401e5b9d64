"""A device that mixes with nothing, for machines without a GPU: its tensors hold a CPU tensor and compute on it.

What CUDA refuses is refused here: tensors of two devices in one op, a CPU generator for a draw on the device, numpy. So
code that runs on it has put every tensor on the device that it came to, and ends with the bits of the CPU. To torch it
is a third kind of device beside "cpu" and "cuda", because a torch without CUDA runs no gradients through tensors that
say "cuda"; it has to be registered before the first gradient of a process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "imitated"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}  # between any two devices
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked for by torch.autocast."""
        return [torch.bfloat16]


def register() -> torch.device:
    """Make the device known to this process, for good; call it before the first gradient."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    return torch.device(NAME, 0)


class ImitatedTensor(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> ImitatedTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Torch has none for tensors of another class; CUDA's copies to the CPU."""
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return _call(func, args, kwargs or {})


class Imitation(TorchDispatchMode):
    """Where it is entered, factories and copies can make tensors of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()  # that ran on the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if any(isinstance(leaf, ImitatedTensor) for leaf in tree_leaves((args, kwargs))):
            self.ops.add(func.name())
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` on what its tensors hold; its results are on the device of its tensors, or on the one it was told."""
    leaves = tree_leaves((args, kwargs))
    is_here = any(isinstance(leaf, ImitatedTensor) for leaf in leaves)
    told = kwargs.get("device")
    goes_here = is_here if told is None else torch.device(told).type == NAME
    if is_here and func not in _COPIES:
        _check_alone(func, args, kwargs)
    if goes_here and any(isinstance(leaf, torch.Generator) and leaf.device.type == "cpu" for leaf in leaves):
        raise RuntimeError(f"{func}: Expected a '{NAME}' device type for generator but found 'cpu'")
    if told is not None and goes_here:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    returned = func._schema.returns
    if len(returned) == 1 and returned[0].alias_info is not None and returned[0].alias_info.is_write:
        return _changed(func, args, kwargs)
    return tree_map(_wrapped, out) if goes_here else out


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument that an op in place, or one with an out=, writes into and returns: that very tensor, not a copy."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[place]
    raise AssertionError(f"{func}: returns what it wrote into, but writes into no argument")


def _check_alone(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """RuntimeError for a CPU tensor of one dimension or more beside tensors of the device. Numbers may be anywhere, and
    so may the indices of an indexed tensor, as on CUDA."""
    given = (args[0], *args[2:]) if func in _INDEXED else args
    for leaf in tree_leaves((given, kwargs)):
        if isinstance(leaf, Tensor) and not isinstance(leaf, ImitatedTensor) and leaf.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got one of shape {tuple(leaf.shape)} on "
                f"{leaf.device} beside {NAME}:0"
            )


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, ImitatedTensor) else leaf


def _wrapped(leaf: Any) -> Any:
    return ImitatedTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, ImitatedTensor) else leaf
