"""Jagged nested tensors under the drop-in: torch computes them, and last_attention_path() says so.

Their class takes F.scaled_dot_product_attention before the dispatcher, and with it the drop-in,
sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from torch_ext import _C
from torch_ext.import_hooks import WhenImported

__all__ = ["install", "remove"]

_MODULE = "torch.nested._internal.ops"
_NAME = "jagged_scaled_dot_product_attention"

_stock: Callable[..., Any] | None = None
_installed = False


def _recorded(*arguments: Any, **options: Any) -> Any:
    if _installed and not torch.compiler.is_compiling():
        _C.record_attention_path("torch: a tensor is nested (jagged)")
    return _stock(*arguments, **options)  # type: ignore[misc]


def _install_in(module: ModuleType) -> None:
    global _stock
    current = getattr(module, _NAME, None)
    if _installed and current is not None and current is not _recorded:
        _stock = current
        setattr(module, _NAME, _recorded)


_when_imported = WhenImported(_MODULE, "jagged_torch_function", _install_in)


def install() -> None:
    """Puts a function that records in front of torch's."""
    global _installed
    _installed = True
    _when_imported.wait()


def remove() -> None:
    """Gives torch's function back."""
    global _installed
    _installed = False
    _when_imported.stop()
    module = sys.modules.get(_MODULE)
    if module is not None and getattr(module, _NAME, None) is _recorded:
        setattr(module, _NAME, _stock)
