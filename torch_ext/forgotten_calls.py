"""Calls of a plain training loop that are left beside an accumulator by habit.

``optimizer.step()`` and ``torch.nn.utils.clip_grad_norm_()`` work on ``.grad``, where an
accumulator leaves nothing: they would do nothing, in silence. Each is said once.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.utils.clip_grad as clip_grad
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["ForgottenCalls"]

_NAME = "torch_ext.GradientAccumulator"


class _Window(Protocol):
    @property
    def micro_batches(self) -> int: ...
    def parameters(self) -> list[Tensor]: ...


class ForgottenCalls:
    """Watches for one accumulator, from the first micro-batch of a window to its end.

    Args:
        window: the accumulator.
        optimizers: its optimizers, whose ``step()`` is the accumulator's.
    """

    def __init__(self, window: _Window, optimizers: Iterable[Optimizer]) -> None:
        self._window = weakref.ref(window)
        self._params = {id(param) for param in window.parameters()}
        self._said: set[str] = set()
        self.is_expected = False
        """Whether the gradients are in .grad at present."""
        handles = [one.register_step_pre_hook(_StepHook(self)) for one in optimizers]
        weakref.finalize(window, _remove, handles)

    def begin(self) -> None:
        if self not in _watching:
            _watching.add(self)
            _install()

    def end(self) -> None:
        self.is_expected = False
        _watching.discard(self)
        if not _watching:
            _uninstall()

    def before_step(self, optimizer: Optimizer) -> None:
        window = self._window()
        if window is None or self.is_expected:
            return
        has_grad = any(p.grad is not None for g in optimizer.param_groups for p in g["params"])
        if window.micro_batches > 0:
            self._say(
                "optimizer.step()",
                "was called while the window holds gradients, which are not in .grad: "
                "accumulator.step() steps the optimizer",
            )
        elif not has_grad:
            self._say(
                "optimizer.step()",
                "found no gradients in .grad: accumulator.step() has stepped the optimizer already",
            )

    def before_clip(self, name: str, params: Iterable[Any]) -> None:
        window = self._window()
        if window is None or window.micro_batches == 0 or self.is_expected:
            return
        if any(id(param) in self._params and param.grad is None for param in params):
            self._say(
                f"torch.nn.utils.{name}()",
                "was called while the window holds gradients, which are not in .grad, and clips "
                "nothing: give the accumulator max_norm or clip_value, or call its fill_grad() "
                "before",
            )

    def _say(self, name: str, message: str) -> None:
        if name not in self._said:
            self._said.add(name)
            warnings.warn(f"{_NAME}: {name} {message}", stacklevel=5)


class _StepHook:
    """A step pre-hook of an optimizer; it does not keep the accumulator alive."""

    torch_ext_own = True

    def __init__(self, calls: ForgottenCalls) -> None:
        self._calls = weakref.ref(calls)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if kwargs.get("closure") is not None or any(arg is not None for arg in args[1:]):
            return  # a closure makes the gradients
        calls = self._calls()
        if calls is not None:
            calls.before_step(optimizer)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


_watching: weakref.WeakSet[ForgottenCalls] = weakref.WeakSet()
# Theirs, ours, by module and name, while any window holds gradients.
_installed: dict[tuple[Any, str], tuple[Any, Any]] = {}


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for calls in list(_watching):
            calls.before_clip(name, params)
        return function(params, *args, **kwargs)

    return call


def _install() -> None:
    if _installed:
        return
    # clip_grad_norm_() finds the first in its module, whoever imported clip_grad_norm_ itself.
    for module, attribute, name in (
        (clip_grad, "_clip_grads_with_norm_", "clip_grad_norm_"),
        (clip_grad, "clip_grad_value_", "clip_grad_value_"),
        (torch.nn.utils, "clip_grad_value_", "clip_grad_value_"),
    ):
        theirs = getattr(module, attribute, None)
        if theirs is not None:
            ours = _watched(name, theirs)
            _installed[module, attribute] = (theirs, ours)
            setattr(module, attribute, ours)


def _uninstall() -> None:
    for (module, attribute), (theirs, ours) in _installed.items():
        if getattr(module, attribute) is ours:
            setattr(module, attribute, theirs)
    _installed.clear()
