"""Where tensors live: the names of devices that users give, and what is wrong with them, and what they can do."""

from __future__ import annotations

import os
import re

import torch


def choose_device(name: str) -> torch.device:
    """The device that `name` means: "cpu", "cuda:1", or "cuda", the current GPU; under torchrun each process's own, by
    its LOCAL_RANK. ValueError for any other name, and for a GPU that torch does not see."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if found is None:
        raise ValueError(f"device: got {str(name)!r}, need 'cpu', 'cuda' or 'cuda:N' with N the number of a GPU")
    if found[0] == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        has = (
            f"is built for CUDA {torch.version.cuda}, but sees none" if torch.version.cuda else "is built without CUDA"
        )
        raise ValueError(f"device: got {name!r}, need a GPU: torch {torch.__version__} {has}; or device 'cpu'")
    wanted = _own_number(found[1], str(name))
    count = torch.cuda.device_count()
    if wanted >= count:
        raise ValueError(f"device: got {name!r}, which is GPU {wanted} here, need 'cuda:N' with N below {count}")
    return torch.device("cuda", wanted)


def _own_number(given: str | None, name: str) -> int:
    """Of the GPU that this process takes."""
    is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not is_shared or torch.distributed.get_world_size() == 1:
        return torch.cuda.current_device() if given is None else int(given)
    if given is not None:
        count = torch.distributed.get_world_size()
        raise ValueError(f"device: got {name!r} for {count} processes, need 'cuda': each takes a GPU of its own")
    return int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank()))


def multiplies_bf16(device: torch.device) -> bool:
    """True where `device` has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
