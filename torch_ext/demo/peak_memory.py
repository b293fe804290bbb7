"""How much memory a piece of a program needs at its highest point."""

from __future__ import annotations

import resource
import sys

import torch

_MIB = 1024.0 * 1024.0


class PeakMemory:
    """Measures from construction to :meth:`mib`, in a process of its own.

    On the CPU: the highest resident set above what was resident at the start (the libraries). On
    Linux the kernel's high-water mark is reset first; where that is refused, and elsewhere, the
    mark of the whole process life is used. On CUDA: the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            with open("/proc/self/clear_refs", "w") as clear_refs:
                clear_refs.write("5")  # man 5 proc: resets VmHWM
        except OSError:
            pass
        self._start = _resident("VmRSS")

    def mib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _MIB
        return max(0.0, _resident("VmHWM") - self._start) / _MIB


def _resident(field: str) -> float:
    """VmRSS or VmHWM in bytes."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return float(line.split()[1]) * 1024.0
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1.0 if sys.platform == "darwin" else 1024.0)
