"""torch's functions on the default generator, turned to each worker thread's own while it works.

Operators are turned by the C++ side (gradient_accumulator_random.cpp). What reads or sets the
default generator's state is Python: ``torch.get_rng_state``, ``torch.manual_seed``, and with them
activation checkpointing, which draws the same dropout mask again.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from torch_ext._C import InterruptibleScope

__all__ = ["OwnGenerator", "TurnedToOwnGenerators"]

_own = threading.local()


class _DefaultGenerator:
    """Stands in for ``torch.random.default_generator``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_own, "generator", None) or _default, name)


_STAND_IN = _DefaultGenerator()
_default: Any = None

# Guards the two above. Of C: Ctrl-C cannot come between its release and the end of its block.
_lock = threading.RLock()
_users: set[int] = set()


class TurnedToOwnGenerators(InterruptibleScope):
    """While one is entered, torch.random asks for a thread's own generator first."""

    def _enter(self) -> None:
        global _default
        with _lock:
            _users.add(id(self))
            if torch.random.default_generator is not _STAND_IN:
                _default = torch.random.default_generator
                torch.random.default_generator = _STAND_IN

    def _exit(self, failed: bool) -> None:
        self._restore()

    def _restore(self) -> None:
        with _lock:
            _users.discard(id(self))
            if not _users and torch.random.default_generator is _STAND_IN:
                torch.random.default_generator = _default


class OwnGenerator(InterruptibleScope):
    """This thread in the state of ``caller``, a CallerState, with a generator of its own."""

    def __init__(self, caller: Any, seed: int) -> None:
        super().__init__()
        self._caller = caller
        self._generator = torch.Generator().manual_seed(seed)

    def _enter(self) -> None:
        self._caller.enter(self._generator)
        _own.generator = self._generator

    def _exit(self, failed: bool) -> None:
        self._restore()

    def _restore(self) -> None:
        _own.generator = None
        self._caller.leave()
