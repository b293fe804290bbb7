"""Micro-batches on streams of a device: one thread starts them, in order, and waits for none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from torch_ext._C import run_then_clean_up
from torch_ext.micro_batch_gradients import Gradients, SeparateWindow

__all__ = ["run_on_streams"]


def run_on_streams(
    window: SeparateWindow, micro_batches: Iterator[Any], streams: int, device: torch.device
) -> None:
    """Adds all micro-batches to the window, on the current stream, in their order.

    Random numbers are drawn in that order too, from the device's default generator.
    """
    module = torch.get_device_module(device)
    current = module.current_stream(device)
    side = [module.Stream(device) for _ in range(streams)]
    # With its micro-batch, whose memory the stream may still be reading.
    started: deque[tuple[Any, Gradients, Any]] = deque()

    def add_oldest() -> None:
        stream, gradients, _ = started.popleft()
        current.wait_stream(stream)
        window.add(gradients)

    def run() -> None:
        for number, micro_batch in enumerate(micro_batches):
            if len(started) == streams:
                add_oldest()
            stream = side[number % streams]
            # Also for the memory of the gradients that have just been added, which it may use
            # again.
            stream.wait_stream(current)
            with module.stream(stream):
                started.append((stream, window.compute(micro_batch), micro_batch))
        while started:
            add_oldest()

    def clean_up() -> None:
        # Ctrl-C may come just before a stream's context is left.
        if hasattr(module, "set_stream"):
            module.set_stream(current)
        for stream in side:
            current.wait_stream(stream)

    run_then_clean_up(run, clean_up)
