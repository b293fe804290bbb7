"""Forward and backward of several micro-batches at once, on worker threads."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.accumulator_arguments import MicroBatchWeight
from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.gradient_reduction import without_reducer
from torch_ext.thread_generator import own_generator, turned_to_own_generators
from torch_ext.worker_pool import shared_pool

__all__ = ["parallel_micro_batches"]

_NAME = "torch_ext.parallel_micro_batches"


def parallel_micro_batches(
    accumulator: GradientAccumulator,
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, float | Tensor]],
    micro_batches: Iterable[Any],
    workers: int | None = None,
) -> Tensor:
    """Adds micro-batches to an accumulator's window, several at once.

    Each is computed on one core, with gradients and a random generator of its own, and they are
    added in their order: the result is bitwise the same for any number of workers.

    Args:
        accumulator: gets the gradients. ``step()`` is still the caller's.
        loss_fn: called as ``loss_fn(model, micro_batch)`` from worker threads; returns the summed
            loss, a tensor of one element, and its weight as in
            :meth:`GradientAccumulator.micro_batch`. Autocast, grad mode, hooks and context
            variables are the caller's. Dropout draws from generators that one number of torch's
            default generator seeds.
        micro_batches: what ``loss_fn`` is called with. Taken as workers come free.
        workers: threads, 1 or more; None: ``torch.get_num_threads()``.

    Returns:
        The mean loss: the sum of the losses divided by the sum of the weights.

    Raises:
        TypeError, ValueError: naming the argument, what it takes and what it got.
        RuntimeError: where micro-batches depend on each other, because one writes a buffer of the
            model (running statistics).

    What ``loss_fn`` raises is raised here, with its traceback; the accumulator is then as it was.
    Hooks on parameters see their gradients as ever, but nothing is put into ``.grad``: hooks that
    look there (``register_post_accumulate_grad_hook``) are not called. Checkpointing has to be the
    kind with ``use_reentrant=False``.
    """
    if not isinstance(accumulator, GradientAccumulator):
        raise TypeError(
            f"{_NAME}: accumulator takes a GradientAccumulator, got {type(accumulator).__name__}"
        )
    if not callable(loss_fn):
        raise TypeError(f"{_NAME}: loss_fn takes a function, got {type(loss_fn).__name__}")
    if workers is None:
        workers = torch.get_num_threads()
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"{_NAME}: workers takes a whole number, got {workers!r}")
    if workers < 1:
        raise ValueError(f"{_NAME}: workers takes a number of at least 1, got {workers}")
    accumulator.check_parallel(_NAME)
    return _Run(accumulator, loss_fn, iter(micro_batches)).run(workers)


class _Result:
    __slots__ = ("grads", "indices", "loss", "weight")

    def __init__(
        self, indices: list[int], grads: list[Tensor], loss: Tensor, weight: MicroBatchWeight
    ) -> None:
        self.indices = indices
        self.grads = grads
        self.loss = loss
        self.weight = weight


class _Run:
    """One call: workers take micro-batches in turn, and add their results in order."""

    def __init__(
        self,
        accumulator: GradientAccumulator,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, float | Tensor]],
        micro_batches: Iterator[Any],
    ) -> None:
        self._accumulator = accumulator
        self._loss_fn = loss_fn
        self._micro_batches = micro_batches
        self._model = without_reducer(accumulator.model)
        self._params = accumulator.parameters()
        self._indices = [i for i, p in enumerate(self._params) if p.requires_grad]
        self._inputs = [self._params[i] for i in self._indices]
        self._window = accumulator.new_core()
        self._caller = torch.classes.torch_ext.CallerState()
        self._context = contextvars.copy_context()
        self._seed = int(torch.randint(2**62, ()).item())
        self._buffers = [
            (name, buffer, buffer._version)
            for name, buffer in self._model.named_buffers()
            if not buffer.is_inference()
        ]
        # Guards all below.
        self._changed = threading.Condition()
        self._taken = 0
        self._added = 0
        self._ahead = 0
        self._exhausted = False
        self._results: dict[int, _Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._losses: list[Tensor] = []

    def run(self, workers: int) -> Tensor:
        # A worker that is far ahead waits: results that are not added yet take memory.
        self._ahead = 2 * workers
        with turned_to_own_generators():
            running = shared_pool().start(workers, self._work)
            try:
                running.wait()
            except BaseException:  # Ctrl-C
                self._stop()
                running.wait()
                raise
        if self._errors:
            number = min(self._errors)
            error = self._errors[number]
            if hasattr(error, "add_note"):
                error.add_note(f"{_NAME}: micro-batch {number}")
            raise error
        self._check_buffers()
        loss = self._mean_loss()
        self._accumulator.merge(self._window)
        return loss

    def _stop(self) -> None:
        with self._changed:
            self._exhausted = True
            self._changed.notify_all()

    def _mean_loss(self) -> Tensor:
        if not self._losses:
            return torch.tensor(float("nan"))
        total = torch.stack([loss.double() for loss in self._losses]).sum()
        return (total / self._window.weight()).to(self._losses[0].dtype)

    def _check_buffers(self) -> None:
        for name, buffer, version in self._buffers:
            if buffer._version != version:
                raise RuntimeError(
                    f"{_NAME}: model takes one whose micro-batches do not write its buffers, got "
                    f"one that wrote {name}: their order would decide what it holds"
                )

    def _take(self) -> tuple[int, Any] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._exhausted or self._taken - self._added < self._ahead
            )
            if self._exhausted:
                return None
            number = self._taken
            try:
                micro_batch = next(self._micro_batches)
            except StopIteration:
                self._exhausted = True
            except BaseException as error:
                self._fail(number, error)
            else:
                self._taken += 1
                return number, micro_batch
            self._changed.notify_all()
            return None

    def _fail(self, number: int, error: BaseException) -> None:
        with self._changed:
            self._errors[number] = error
            self._exhausted = True
            self._changed.notify_all()

    def _work(self) -> None:
        context = self._context.copy()
        while (taken := self._take()) is not None:
            number, micro_batch = taken
            try:
                result = context.run(self._compute, number, micro_batch)
                self._add(number, result)
            except BaseException as error:
                self._fail(number, error)

    def _compute(self, number: int, micro_batch: Any) -> _Result:
        with own_generator(self._caller, (self._seed + number) % 2**63):
            returned = self._loss_fn(self._model, micro_batch)
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise TypeError(
                    f"{_NAME}: loss_fn takes a function that returns (summed loss, weight), got "
                    f"one that returned {type(returned).__name__}"
                )
            loss, weight = returned
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise TypeError(
                    f"{_NAME}: loss_fn takes a function that returns a loss of one element with a "
                    "gradient, got " + _described(loss)
                )
            checked = MicroBatchWeight(weight, loss.device)
            grads = torch.autograd.grad(loss, self._inputs, allow_unused=True)
        present = [k for k, grad in enumerate(grads) if grad is not None]
        return _Result(
            [self._indices[k] for k in present],
            [grads[k] for k in present],
            loss.detach(),
            checked,
        )

    def _add(self, number: int, result: _Result) -> None:
        with self._changed:
            self._results[number] = result
            while (following := self._results.pop(self._added, None)) is not None:
                weight = following.weight
                self._window.add(following.indices, following.grads, weight.number, weight.tensor)
                self._losses.append(following.loss)
                self._added += 1
            self._changed.notify_all()


def _described(loss: Any) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    gradient = "with" if loss.requires_grad else "without"
    return f"one of sizes {tuple(loss.shape)} {gradient} a gradient"
