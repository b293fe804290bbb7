"""A progress bar on a terminal, a few plain lines elsewhere; both on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts the steps of one run.

    In a log or a pipe, where a bar would leave a line for every redraw, ten lines in all.
    """

    def __init__(self, title: str, steps: int) -> None:
        self._title = title
        self._steps = steps
        self._done = 0
        self._started = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=steps, desc=f"{title:<14}", unit="step", dynamic_ncols=True)

    def advance(self, loss: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()
            return
        tenth = self._done * 10 // self._steps
        if tenth != (self._done - 1) * 10 // self._steps:
            elapsed = time.perf_counter() - self._started
            print(
                f"{self._title:<14} {self._done:>5}/{self._steps} steps  loss {loss:.4f}"
                f"  {elapsed:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
