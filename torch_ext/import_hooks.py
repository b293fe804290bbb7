"""Runs something as soon as a module has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["WhenImported"]


class _Loader(importlib.abc.Loader):
    """The module's own loader, followed by the callback."""

    def __init__(
        self, loader: importlib.abc.Loader, callback: Callable[[ModuleType], None]
    ) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._callback(module)


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `callback(module)` once the module is there.

    Waits in sys.meta_path from `wait` on until the import or `stop`. A module whose import is
    complete already (its attribute `last` is there) gets its callback at once.
    """

    def __init__(self, name: str, last: str, callback: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._last = last
        self._callback = callback

    def wait(self) -> None:
        """Calls back now, or when the module is imported."""
        module = sys.modules.get(self._name)
        if module is not None and hasattr(module, self._last):
            self._callback(module)
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Waits no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        self.stop()
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._callback)
        return spec
