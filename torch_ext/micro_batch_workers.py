"""Micro-batches on worker threads, for the CPU: each computes on one core.

The threads are those of torch's parallel regions (worker_team.h), where there are enough of them
and the caller is in no region itself; a pool's own otherwise.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from torch_ext._C import run_on_team, run_then_clean_up
from torch_ext.micro_batch_gradients import NAME, Gradients, SeparateWindow
from torch_ext.thread_generator import OwnGenerator, TurnedToOwnGenerators
from torch_ext.worker_pool import Running, shared_pool

__all__ = ["run_on_workers"]

# A forked process has none of the threads that its copy of OpenMP still counts on.
_team_was_lost = False


def _lose_team() -> None:
    global _team_was_lost
    _team_was_lost = True


os.register_at_fork(after_in_child=_lose_team)


def run_on_workers(window: SeparateWindow, micro_batches: Iterator[Any], workers: int) -> None:
    """Adds all micro-batches to the window; raises what the first of them that failed raised."""
    _Run(window, micro_batches).run(workers)


class _Run:
    """One call: workers take micro-batches in turn, and add their results in order.

    The caller's thread may be a worker, and Ctrl-C raises there between any two steps. Locks and
    queues are those of C, whose ``with`` and whose waiting cannot be cut in two.
    """

    def __init__(self, window: SeparateWindow, micro_batches: Iterator[Any]) -> None:
        self._window = window
        self._micro_batches = micro_batches
        self._caller = torch.classes.torch_ext.CallerState()
        self._context = contextvars.copy_context()
        self._seed = int(torch.randint(2**62, ()).item())
        self._workers = 0
        # An entry for each micro-batch that may be taken.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Guards all below.
        self._lock = threading.RLock()
        self._taken = 0
        self._added = 0
        self._exhausted = False
        self._results: dict[int, Gradients] = {}
        self._errors: dict[int, BaseException] = {}

    def run(self, workers: int) -> None:
        self._workers = workers
        # A worker that is far ahead waits: results that are not added yet take memory.
        for _ in range(2 * workers):
            self._room.put(None)
        with TurnedToOwnGenerators():
            is_lost = _team_was_lost and workers > 1
            if is_lost or not run_on_team(workers, self._work, self._stop):
                self._run_on_pool(workers)
        if self._errors:
            # Ctrl-C before errors.
            number = min(self._errors, key=lambda k: (isinstance(self._errors[k], Exception), k))
            error = self._errors[number]
            if hasattr(error, "add_note"):
                error.add_note(f"{NAME}: micro-batch {number}")
            raise error

    def _run_on_pool(self, workers: int) -> None:
        running = Running(workers, self._work)

        def run() -> None:
            shared_pool().start(running)
            running.wait()

        def clean_up() -> None:
            self._stop()
            running.close()

        run_then_clean_up(run, clean_up)

    def _stop(self) -> None:
        with self._lock:
            self._exhausted = True
        for _ in range(self._workers):  # those who wait find out
            self._room.put(None)

    def _fail(self, number: int, error: BaseException) -> None:
        with self._lock:
            self._errors[number] = error
        self._stop()

    def _take(self) -> tuple[int, Any] | None:
        self._room.get()
        with self._lock:
            if self._exhausted:
                return None
            number = self._taken
            try:
                micro_batch = next(self._micro_batches)
            except StopIteration:
                self._stop()
            except BaseException as error:
                self._fail(number, error)
            else:
                self._taken += 1
                return number, micro_batch
            return None

    def _work(self) -> None:
        context = self._context.copy()
        while (taken := self._take()) is not None:
            number, micro_batch = taken
            try:
                self._add(number, context.run(self._compute, number, micro_batch))
            except BaseException as error:
                self._fail(number, error)

    def _compute(self, number: int, micro_batch: Any) -> Gradients:
        with OwnGenerator(self._caller, (self._seed + number) % 2**63):
            return self._window.compute(micro_batch)

    def _add(self, number: int, gradients: Gradients) -> None:
        with self._lock:
            self._results[number] = gradients
            while (following := self._results.pop(self._added, None)) is not None:
                self._window.add(following)
                self._added += 1
                self._room.put(None)
