"""Ctrl-C at every step that this package's Python takes, one run after the other."""

from __future__ import annotations

import linecache
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch_ext

_PACKAGE = str(Path(torch_ext.__file__).parent)


def _runs_interrupted(call: Callable[[], object], step: int) -> bool:
    """Whether a KeyboardInterrupt came in at the step of this number, before ``call`` was done."""
    taken = 0
    hit = False

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal taken, hit
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        # A tracer may raise between a block and its context's __exit__; a signal cannot.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event not in ("call", "line") or line.startswith("with "):
            return trace
        taken += 1
        if taken == step:
            hit = True
            raise KeyboardInterrupt  # which ends the tracing too
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert hit
    finally:
        sys.settrace(before)
    return hit


def interrupted_at_every_step(call: Callable[[], object], limit: int = 2000) -> Iterator[int]:
    """Calls ``call`` again and again, interrupted one step later each time; yields after each."""
    for step in range(1, limit):
        hit = _runs_interrupted(call, step)
        yield step
        if not hit:
            return
    raise AssertionError(f"more than {limit} steps")


def interrupted_by_signals(
    call: Callable[[], object], times: int, longest: float
) -> Iterator[bool]:
    """Calls ``call`` so often, and lets a signal raise KeyboardInterrupt some time after the start;
    yields whether it did, with no signal on its way."""
    choose = random.Random(0)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(times):
            hit = False
            try:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-5, longest))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hit = True
            yield hit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
