"""Families that choose an attention class by the implementation's name, as Falcon and SAM do.

Their modeling files hold dictionaries such as ``SAM_VISION_ATTENTION_CLASSES = {"eager": ...,
"sdpa": ...}``, and the class under "sdpa" calls ``F.scaled_dot_product_attention`` itself. Under
"torch_ext" stands the same class with that one call made to torch_ext.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from torch_ext.attention import scaled_dot_product_attention

_changed: list[tuple[dict[str, type], str]] = []


def add(model_class: type, name: str) -> None:
    """Enters ``name`` into the dictionaries of the model's modeling files that know "sdpa"."""
    for base in model_class.__mro__:
        module = sys.modules.get(base.__module__)
        for variable, classes in list(getattr(module, "__dict__", {}).items()):
            if (
                variable.endswith("_CLASSES")
                and isinstance(classes, dict)
                and {"eager", "sdpa"} <= classes.keys()
                and name not in classes
            ):
                classes[name] = _on_torch_ext(classes["sdpa"])
                _changed.append((classes, name))


def remove() -> None:
    """Takes out everything that ``add`` entered."""
    while _changed:
        classes, name = _changed.pop()
        classes.pop(name, None)


class _FusedAttention(TorchFunctionMode):
    """``F.scaled_dot_product_attention`` is torch_ext's inside, in this thread only."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class _NamedSdpa:
    """A configuration whose implementation reads "sdpa": Falcon asks for it in every forward."""

    _attn_implementation = "sdpa"

    def __init__(self, config: Any) -> None:
        self.__dict__["_of"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_of":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._of, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)


@functools.cache
def _on_torch_ext(sdpa_class: Any) -> Any:
    class OnTorchExt(sdpa_class):
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            if hasattr(self, "config"):
                self.config = _NamedSdpa(config)

        def forward(self, *arguments: Any, **options: Any) -> Any:
            with _FusedAttention():
                return super().forward(*arguments, **options)

        def __reduce__(self) -> tuple[Any, ...]:
            return _empty, (sdpa_class,), self.__dict__

    OnTorchExt.__name__ = OnTorchExt.__qualname__ = sdpa_class.__name__ + "OnTorchExt"
    return OnTorchExt


def _empty(sdpa_class: Any) -> nn.Module:
    """For pickle and deepcopy, which cannot find a class made at run time by its name."""
    made = _on_torch_ext(sdpa_class)
    return made.__new__(made)
