"""Where the user's torch is, without importing it: build isolation hides it from sys.path, not from sys.prefix."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from pathlib import Path

MIN_TORCH = (2, 10)
_MARKER = Path("include", "torch", "csrc", "stable", "library.h")


def torch_dirs() -> list[Path]:
    """Every place a torch package may be, best first: ROSAQ_TORCH_DIR alone if set, else sys.path, else sys.prefix."""
    forced = os.environ.get("ROSAQ_TORCH_DIR")
    if forced:
        return [Path(forced)]
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    return found + [Path(sysconfig.get_path(scheme), "torch") for scheme in ("platlib", "purelib")]


def torch_version(torch_dir: Path) -> str:
    """The version string of the torch package in `torch_dir`, read from its version.py."""
    match = re.search(r"__version__ = '([^']+)'", (torch_dir / "version.py").read_text())
    if match is None:
        raise SystemExit(f"rosaq build: {torch_dir}/version.py: no version in it, need a torch installation")
    return match.group(1)


def find_torch() -> Path | None:
    """The torch package directory to compile against, or None. Exits with a message if what is there will not do."""
    for torch_dir in torch_dirs():
        if not (torch_dir / "version.py").exists():
            continue
        version = torch_version(torch_dir)
        numbers = tuple(int(part) for part in version.split(".")[:2])
        if numbers < MIN_TORCH:
            raise SystemExit(f"rosaq build: torch: got {version} in {torch_dir}, need 2.10 or newer")
        if not (torch_dir / _MARKER).exists():
            raise SystemExit(f"rosaq build: torch: {torch_dir} has no C++ headers, need {_MARKER}")
        return torch_dir
    if os.environ.get("ROSAQ_TORCH_DIR"):
        raise SystemExit(
            f"rosaq build: ROSAQ_TORCH_DIR: got {os.environ['ROSAQ_TORCH_DIR']}, need a torch package folder"
        )
    return None
