"""The context of one micro-batch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor

from torch_ext._C import InterruptibleScope
from torch_ext.accumulator_arguments import MicroBatchWeight

if TYPE_CHECKING:
    from torch_ext.gradient_accumulation import GradientAccumulator

__all__ = ["MicroBatch"]

# One for each time that a micro-batch is entered.
_tickets = itertools.count(1)


class MicroBatch(InterruptibleScope):
    """The context of one micro-batch, from :meth:`GradientAccumulator.micro_batch`."""

    def __init__(
        self, accumulator: GradientAccumulator, weight: float | Tensor, separate: bool = False
    ) -> None:
        super().__init__()
        self._accumulator = accumulator
        self._separate = separate
        self._discarded = False
        self._ticket = 0
        self.weight = weight

    @property
    def weight(self) -> float | Tensor:
        """May be set until the context ends, for a weight that the forward pass finds out."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Tensor) -> None:
        self._checked = MicroBatchWeight(weight, self._accumulator.device)
        self._weight = weight

    def discard(self) -> None:
        """Leaves this micro-batch out, when its context ends: its gradients and its weight.

        Before its ``backward()``, which adds to the sums of earlier micro-batches; after it too
        with ``micro_batch(separate=True)``, or in a window's first micro-batch.
        """
        self._accumulator._check_discardable(self._ticket)
        self._discarded = True

    def _enter(self) -> None:
        self._discarded = False
        self._ticket = next(_tickets)
        self._accumulator._open(self._ticket, self._separate)

    def _exit(self, failed: bool) -> None:
        if failed or self._discarded:
            self._restore()
        else:
            self._accumulator._close(self._checked)

    def _restore(self) -> None:
        self._accumulator._abandon(self._ticket)
