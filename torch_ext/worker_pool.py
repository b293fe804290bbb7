"""Worker threads that compute on one core each, kept from call to call.

For where the threads of torch's parallel regions cannot be the workers.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from torch_ext._C import compute_alone

__all__ = ["Running", "WorkerPool", "shared_pool"]


class Running:
    """One task that several threads work on.

    The caller's thread may be interrupted between any two steps: all that it calls may be called
    again, and what counts is counted by the workers.

    Args:
        workers: how many threads call it.
        task: must not raise.
    """

    def __init__(self, workers: int, task: Callable[[], None]) -> None:
        self.workers = workers
        self._task = task
        self._lock = threading.RLock()
        self._at_work = 0
        self._finished = 0
        self._closed = False
        # An entry for each that has ended. It wakes the caller, who looks at the numbers.
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run_one(self) -> None:
        """What a worker does."""
        with self._lock:
            if self._closed:
                return
            self._at_work += 1
        try:
            self._task()
        finally:
            with self._lock:
                self._at_work -= 1
                self._finished += 1
            self._ended.put(None)

    def wait(self) -> None:
        """Returns when all workers have come and gone."""
        while self._finished < self.workers:
            self._wait_a_while()

    def close(self) -> None:
        """Returns when none is at work; those who come later find nothing to do."""
        with self._lock:
            self._closed = True
        while self._at_work:
            self._wait_a_while()

    def _wait_a_while(self) -> None:
        try:
            self._ended.get(timeout=0.1)
        except queue.Empty:
            return


class WorkerPool:
    """Threads whose torch operators do not start threads of their own.

    A sum that is split among threads depends on their number; a worker's does not.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def start(self, running: Running) -> None:
        """Hands the task to as many threads; tasks of several callers queue up."""
        with self._lock:
            while self._threads < running.workers:
                name = f"torch_ext micro-batches {self._threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._threads += 1
        for _ in range(running.workers):
            self._tasks.put(running.run_one)

    def _work(self) -> None:
        compute_alone()
        while True:
            self._tasks.get()()


_pools: dict[int, WorkerPool] = {}


def shared_pool() -> WorkerPool:
    """The process's pool; a forked process gets its own."""
    return _pools.setdefault(os.getpid(), WorkerPool())
