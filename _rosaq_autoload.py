"""Teach transformers `quant_method: rosaq` in every process, at no cost until a rosaq checkpoint is loaded.

torch calls `autoload` at the end of `import torch` (entry-point group torch.backends): without it, transformers would
read a rosaq checkpoint of a process that never said `import rosaq` as dense, and run on random weights with a warning.
It lies outside the package because importing that would import torch in the middle of its own import; it imports
nothing itself and must never raise. ROSAQ_AUTOLOAD=0 turns it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

METHOD = "rosaq"
TARGET = "transformers.quantizers.auto"


class _LoadWhenUsed:
    """Stands in transformers' tables for rosaq's classes, which replace it when the first config is read."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        # A rosaq that cannot be imported raises here, where its checkpoint is loaded, and nowhere else.
        import_module("rosaq.integrations.transformers").register()
        return sys.modules[TARGET].AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD].from_dict(values, **kwargs)


def register() -> None:
    """Put rosaq into the tables of TARGET, which is loaded; whatever stands there already stays."""
    auto = sys.modules[TARGET]
    for table in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        # No such table: a transformers of another age, which rosaq cannot serve and must not break.
        getattr(auto, table, {}).setdefault(METHOD, _LoadWhenUsed)


class _Finder(MetaPathFinder):
    """Finds TARGET through the other finders, and has it registered when it is executed."""

    def __init__(self) -> None:
        self._is_asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != TARGET or self._is_asking_others:
            return None
        self._is_asking_others = True
        try:
            spec = find_spec(fullname)
        finally:
            self._is_asking_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, real: Loader, finder: _Finder) -> None:
        self._real, self._finder = real, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: resources and reload must not come back here.
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._real.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        register()


def install() -> None:
    """Register now if transformers' quantisers are loaded, else as soon as they are."""
    if TARGET in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_on() -> bool:
    """False where the environment turns autoloading off."""
    return os.environ.get("ROSAQ_AUTOLOAD", "1") != "0"


def autoload() -> None:
    """The entry point."""
    if is_on():
        install()
