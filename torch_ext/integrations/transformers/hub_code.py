"""Model code from outside of transformers that asks for "sdpa" by its name.

Files on the Hub are often copies of older modeling files: ``if config._attn_implementation ==
"sdpa": ... else: <eager>``. No registry is asked there, so "torch_ext" gets the eager branch, whose
numbers are right and whose speed is not. Nothing can be put in between: the string is theirs.
"""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from types import ModuleType
from typing import Any

__all__ = ["warn_where_sdpa_is_asked_for"]

_warned: set[type] = set()

# Of modules that ask transformers' registry, or have a table of classes (sdpa_classes.py).
_REGISTRIES = ("ALL_ATTENTION_FUNCTIONS", "AttentionInterface", "_ATTENTION_CLASSES")


def warn_where_sdpa_is_asked_for(model_class: type, name: str) -> None:
    """Warns once for a class whose modeling file, outside of transformers, compares with "sdpa"."""
    if model_class in _warned:
        return
    _warned.add(model_class)
    for base in model_class.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and _is_foreign(module) and _compares_with_sdpa(module):
            warnings.warn(
                f'torch_ext: attn_implementation="{name}": the code of {model_class.__name__} '
                f'({base.__module__}) compares the name of the implementation with "sdpa" itself '
                f'and computes anything else as "eager". Call torch_ext.enable() and load it with '
                f'attn_implementation="sdpa": that runs fused',
                stacklevel=2,
            )
            return


def _is_foreign(module: ModuleType) -> bool:
    package = module.__name__.partition(".")[0]
    return package not in ("transformers", "torch", "torch_ext", "builtins")


def _compares_with_sdpa(module: ModuleType) -> bool:
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # typed in, or compiled
        return False
    if "sdpa" not in source or any(registry in source for registry in _REGISTRIES):
        return False
    return any(_is_comparison(node) for node in ast.walk(ast.parse(source)))


def _is_comparison(node: Any) -> bool:
    """``..._attn_implementation == "sdpa"``, either way round, ``!=`` and ``in`` too."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(map(_names_implementation, sides)) and any(
        isinstance(part, ast.Constant) and part.value == "sdpa"
        for side in sides
        for part in ast.walk(side)
    )


def _names_implementation(node: ast.expr) -> bool:
    identifier = getattr(node, "attr", None) or getattr(node, "id", None) or ""
    return "attn_implementation" in identifier
