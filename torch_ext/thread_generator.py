"""torch's functions on the default generator, turned to each worker thread's own while it works.

Operators are turned by the C++ side (gradient_accumulator_random.cpp). What reads or sets the
default generator's state is Python: ``torch.get_rng_state``, ``torch.manual_seed``, and with them
activation checkpointing, which draws the same dropout mask again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["own_generator", "turned_to_own_generators"]

_own = threading.local()
_lock = threading.Lock()
_users = 0
_default: Any = None


class _DefaultGenerator:
    """Stands in for ``torch.random.default_generator``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_own, "generator", None) or _default, name)


@contextlib.contextmanager
def turned_to_own_generators() -> Iterator[None]:
    """While it lasts, torch.random asks for a thread's own generator first."""
    global _users, _default
    with _lock:
        _users += 1
        if _users == 1:
            _default = torch.random.default_generator
            torch.random.default_generator = _DefaultGenerator()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch.random.default_generator = _default


@contextlib.contextmanager
def own_generator(caller: Any, seed: int) -> Iterator[None]:
    """This thread in the state of ``caller``, a CallerState, with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    caller.enter(generator)
    _own.generator = generator
    try:
        yield
    finally:
        _own.generator = None
        caller.leave()
