"""Worker threads that compute on one core each, kept from call to call.

For where the threads of torch's parallel regions cannot be the workers.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

import torch

__all__ = ["WorkerPool", "shared_pool"]


class Running:
    """What :meth:`WorkerPool.start` has started."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._done = threading.Semaphore(0)

    def one_is_done(self) -> None:
        self._done.release()

    def wait(self) -> None:
        """Returns when all have returned; may be called again when it was interrupted."""
        while self._workers:
            # Now and then Python looks whether Ctrl-C came just before it began to wait.
            if self._done.acquire(timeout=1):
                self._workers -= 1


class WorkerPool:
    """Threads whose torch operators do not start threads of their own.

    A sum that is split among threads depends on their number; a worker's does not.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def start(self, workers: int, task: Callable[[], None]) -> Running:
        """Runs ``task``, which must not raise, once in each of so many threads.

        Tasks of several callers queue up.
        """
        self._grow_to(workers)
        running = Running(workers)

        def run_one() -> None:
            try:
                task()
            finally:
                running.one_is_done()

        for _ in range(workers):
            self._tasks.put(run_one)
        return running

    def _grow_to(self, workers: int) -> None:
        with self._lock:
            missing = workers - self._threads
            if missing <= 0:
                return
            threads = torch.get_num_threads()
            ready = threading.Semaphore(0)
            for _ in range(missing):
                name = f"torch_ext micro-batches {self._threads}"
                threading.Thread(target=self._work, args=(ready,), name=name, daemon=True).start()
                self._threads += 1
            for _ in range(missing):
                ready.acquire()
            # Each has set its own number, and with it the default of threads to come.
            torch.set_num_threads(threads)

    def _work(self, ready: threading.Semaphore) -> None:
        torch.get_num_threads()  # a thread takes over the default once, now rather than later
        torch.set_num_threads(1)
        ready.release()
        del ready
        while True:
            self._tasks.get()()


_pools: dict[int, WorkerPool] = {}


def shared_pool() -> WorkerPool:
    """The process's pool; a forked process gets its own."""
    return _pools.setdefault(os.getpid(), WorkerPool())
