"""What the memory moves at most, measured in the same rounds as what is held against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timing import Measurement

COPY, UPDATE = "copy", "update"


class BandwidthProbe:
    """Two ways to read as many bytes as are written: from one place to another, and in place.

    The faster one counts. Copying in torch first reads each line that it overwrites, which nobody
    counts; updating in place does not pay that.
    """

    def __init__(self, megabytes: int = 256) -> None:
        self._source = torch.ones(megabytes << 18)
        self._target = torch.zeros(megabytes << 18)

    def calls(self) -> dict[str, Callable[[], object]]:
        return {
            COPY: lambda: self._target.copy_(self._source),
            UPDATE: lambda: self._target.mul_(1.0),
        }

    def bytes_per_second(self, times: Mapping[str, Measurement]) -> float:
        moved = 2.0 * self._source.nbytes
        return max(moved / times[name].median for name in (COPY, UPDATE))
