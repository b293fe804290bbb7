"""One micro-batch after the other into a window of its own: what workers and streams share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.accumulator_arguments import MicroBatchWeight
from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.gradient_reduction import without_reducer

__all__ = ["NAME", "Gradients", "LossFunction", "SeparateWindow"]

NAME = "torch_ext.parallel_micro_batches"

LossFunction = Callable[[nn.Module, Any], "tuple[Tensor, float | Tensor]"]


class Gradients:
    """What one micro-batch gives."""

    __slots__ = ("grads", "indices", "loss", "weight")

    def __init__(
        self, indices: list[int], grads: list[Tensor], loss: Tensor, weight: MicroBatchWeight
    ) -> None:
        self.indices = indices
        self.grads = grads
        self.loss = loss
        self.weight = weight


class SeparateWindow:
    """Micro-batches that reach their accumulator all together, or not at all.

    Args:
        accumulator: whose model computes, and which gets the gradients in the end.
        loss_fn: as in parallel_micro_batches.
    """

    def __init__(self, accumulator: GradientAccumulator, loss_fn: LossFunction) -> None:
        self._accumulator = accumulator
        self._loss_fn = loss_fn
        self._model = without_reducer(accumulator.model)
        params = accumulator.parameters()
        self._indices = [i for i, param in enumerate(params) if param.requires_grad]
        self._inputs = [params[i] for i in self._indices]
        self._window = accumulator.new_core()
        self._losses: list[Tensor] = []
        self._buffers = [
            (name, buffer, buffer._version)
            for name, buffer in self._model.named_buffers()
            if not buffer.is_inference()
        ]

    def compute(self, micro_batch: Any) -> Gradients:
        """Forward and backward; touches no ``.grad``, so that several threads may do it at once."""
        returned = self._loss_fn(self._model, micro_batch)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"{NAME}: loss_fn takes a function that returns (summed loss, weight), got one "
                f"that returned {type(returned).__name__}"
            )
        loss, weight = returned
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(
                f"{NAME}: loss_fn takes a function that returns a loss of one element with a "
                f"gradient, got {_described(loss)}"
            )
        checked = MicroBatchWeight(weight, loss.device)
        grads = torch.autograd.grad(loss, self._inputs, allow_unused=True)
        present = [k for k, grad in enumerate(grads) if grad is not None]
        return Gradients(
            [self._indices[k] for k in present],
            [grads[k] for k in present],
            loss.detach(),
            checked,
        )

    def add(self, gradients: Gradients) -> None:
        """To be called in the order of the micro-batches."""
        weight = gradients.weight
        self._window.add(gradients.indices, gradients.grads, weight.number, weight.tensor)
        self._losses.append(gradients.loss)

    def merge(self) -> Tensor:
        """Adds the window to the accumulator's; returns the mean loss."""
        for name, buffer, version in self._buffers:
            if buffer._version != version:
                raise RuntimeError(
                    f"{NAME}: model takes one whose micro-batches do not write its buffers, got "
                    f"one that wrote {name}: their order would decide what it holds"
                )
        loss = torch.tensor(float("nan"))
        if self._losses:
            total = torch.stack([loss.double() for loss in self._losses]).sum()
            loss = (total / self._window.weight()).to(self._losses[0].dtype)
        self._accumulator.merge(self._window)
        return loss


def _described(loss: Any) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    gradient = "with" if loss.requires_grad else "without"
    return f"one of sizes {tuple(loss.shape)} {gradient} a gradient"
