"""PEP 517 backend: setuptools, plus torch as a build requirement only where the user has none.

Naming torch in build-system.requires would make a build isolated by pip download a second one, several gigabytes,
though the user's own is in reach (find_torch.py). With the stable ABI it does not matter which torch has the headers.
"""

from __future__ import annotations

from typing import Any

from find_torch import find_torch
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (PEP 517 hooks, called by name)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _torch_if_missing() -> list[str]:
    return [] if find_torch() is not None else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What the isolated environment needs beside build-system.requires."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """As get_requires_for_build_wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_missing()
