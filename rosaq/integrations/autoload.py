"""Register with transformers when, and only if, somebody imports it: `import rosaq` alone stays light."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _RegisterAfterImport(MetaPathFinder, Loader):
    """Finds TARGET through the other finders, once, and registers when it has been executed."""

    def __init__(self) -> None:
        self._loader: Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != TARGET:
            return None
        # Out of the way first: find_spec below asks every finder, this one included.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if self._loader else None

    def exec_module(self, module: ModuleType) -> None:
        if self._loader is None or module.__spec__ is None:
            raise ImportError(f"{TARGET}: got no loader, need one found by this hook")
        # The module keeps its own loader: resources and reload must not come back here.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()


def register() -> None:
    """Make transformers read `quant_method: rosaq`; does nothing where that is done already."""
    import_module("rosaq.integrations.transformers").register()


def install() -> None:
    """Register now if transformers' quantisers are loaded, else as soon as they are."""
    if TARGET in sys.modules:
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
