"""Forward and backward of several micro-batches at once."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.micro_batch_gradients import NAME, LossFunction, SeparateWindow
from torch_ext.micro_batch_streams import run_on_streams
from torch_ext.micro_batch_workers import run_on_workers

__all__ = ["parallel_micro_batches"]


def parallel_micro_batches(
    accumulator: GradientAccumulator,
    loss_fn: LossFunction,
    micro_batches: Iterable[Any],
    workers: int | None = None,
) -> Tensor:
    """Adds micro-batches to an accumulator's window, several at once.

    On the CPU each is computed by a worker thread, on one core, with gradients and a random
    generator of its own; on other devices by a stream. They are added in their order: the result is
    bitwise the same for any number of workers.

    Args:
        accumulator: gets the gradients. ``step()`` is still the caller's.
        loss_fn: called as ``loss_fn(model, micro_batch)``, from worker threads (the caller's
            may be one); returns the summed loss, a tensor of one element, and its weight as in
            :meth:`GradientAccumulator.micro_batch`. Autocast, grad mode, hooks and context
            variables are the caller's. Dropout draws from generators that one number of torch's
            default generator seeds.
        micro_batches: what ``loss_fn`` is called with. Taken as workers come free.
        workers: threads or streams, 1 or more; None: ``torch.get_num_threads()`` threads, 2
            streams.

    Returns:
        The mean loss: the sum of the losses divided by the sum of the weights.

    Raises:
        TypeError, ValueError: naming the argument, what it takes and what it got.
        RuntimeError: where micro-batches depend on each other, because one writes a buffer of the
            model (running statistics).

    What ``loss_fn`` raises is raised here, with its traceback; the accumulator is then as it was.
    After Ctrl-C too, unless all micro-batches were done: then it has them all.
    Hooks on parameters see their gradients as ever, but nothing is put into ``.grad``: hooks that
    look there (``register_post_accumulate_grad_hook``) are not called. Checkpointing has to be the
    kind with ``use_reentrant=False``.
    """
    if not isinstance(accumulator, GradientAccumulator):
        raise TypeError(
            f"{NAME}: accumulator takes a GradientAccumulator, got {type(accumulator).__name__}"
        )
    if not callable(loss_fn):
        raise TypeError(f"{NAME}: loss_fn takes a function, got {type(loss_fn).__name__}")
    if workers is None:
        workers = torch.get_num_threads() if accumulator.device.type == "cpu" else 2
    if isinstance(workers, bool) or not isinstance(workers, Integral):
        raise TypeError(f"{NAME}: workers takes a whole number, got {workers!r}")
    if workers < 1:
        raise ValueError(f"{NAME}: workers takes a number of at least 1, got {workers}")
    workers = int(workers)
    accumulator.check_parallel(NAME)
    window = SeparateWindow(accumulator, loss_fn)
    if accumulator.device.type == "cpu":
        run_on_workers(window, iter(micro_batches), workers)
    else:
        run_on_streams(window, iter(micro_batches), workers, accumulator.device)
    return window.merge()
