"""What the variants do with the batch of one step, from forward to optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import torch_ext

_MAX_GRAD_NORM = 1.0

LossSum = Callable[[nn.Module, Tensor, Tensor], Tensor]


class TrainingLoop(Protocol):
    """One optimizer step for a batch, tokens and targets ``(batch, seq)``.

    Attributes:
        schedule: how a step goes, for people.
    """

    schedule: str

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Trains on the batch; returns its mean loss before the step."""
        ...


class OneBatch:
    """The whole batch at once: stock PyTorch."""

    schedule = "one batch"

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss_sum: LossSum) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss_sum = loss_sum

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        loss = self._loss_sum(self._model, inputs, targets) / targets.numel()
        loss.backward()
        self._clip_and_step()
        return loss.item()

    def _clip_and_step(self) -> None:
        nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()


class StockMicroBatches(OneBatch):
    """The batch in parts, one after the other, their gradients added in ``.grad``."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_sum: LossSum, parts: int
    ) -> None:
        super().__init__(model, optimizer, loss_sum)
        self._parts = parts
        self.schedule = f"{parts} parts in turn"

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        total = 0.0
        for part in _cut(inputs, targets, self._parts):
            loss = self._loss_sum(self._model, *part) / targets.numel()
            loss.backward()
            total += loss.item()
        self._clip_and_step()
        return total


class AccumulatedMicroBatches:
    """The batch in parts through torch_ext's GradientAccumulator; on the CPU several at once."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_sum: LossSum, parts: int
    ) -> None:
        self._accumulator = torch_ext.GradientAccumulator(model, optimizer, max_norm=_MAX_GRAD_NORM)
        self._loss_sum = loss_sum
        self._parts = parts
        device = next(model.parameters()).device
        self._workers = min(parts, torch.get_num_threads()) if device.type == "cpu" else 1
        at_once = f"{self._workers} at once" if self._workers > 1 else "in turn"
        self.schedule = f"{parts} parts {at_once}"

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        parts = _cut(inputs, targets, self._parts)
        if self._workers > 1:
            loss = torch_ext.parallel_micro_batches(
                self._accumulator, self._weighted_loss, parts, self._workers
            )
        else:
            loss = self._one_after_the_other(parts) / targets.numel()
        self._accumulator.step()
        return loss.item()

    def _weighted_loss(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return self._loss_sum(model, *part), part[1].numel()

    def _one_after_the_other(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros((), device=next(self._accumulator.model.parameters()).device)
        for part in parts:
            with self._accumulator.micro_batch(weight=part[1].numel()):
                loss = self._loss_sum(self._accumulator.model, *part)
                loss.backward()
            total += loss.detach()
        return total


def _cut(inputs: Tensor, targets: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
    """So many parts, of whole sequences."""
    return list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))
