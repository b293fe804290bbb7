"""One window of transformers.Trainer's: its rules, on top of GradientAccumulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.visible_gradients import VisibleGradients

__all__ = ["TrainerWindow"]


class TrainerWindow(GradientAccumulator):
    """The gradient is the plain sum of the micro-batches': the Trainer has divided their losses.

    The weights of a window add up to 1, but where an epoch has ended inside a window: then the
    next epoch's first micro-batches come on top, as in the Trainer.
    """

    is_between_micro_batches = False
    """Whether ``.grad`` holds what the window has summed so far: see :meth:`with_sums_so_far`."""

    @property
    def is_prepared(self) -> bool:
        """Whether the norm of this window has been asked for."""
        return self._prepared is not None

    @property
    def is_shown(self) -> bool:
        """Whether ``.grad`` holds this window's gradient."""
        return self._shown is not None

    def is_whole(self, parameters: list[Tensor]) -> bool:
        """Whether all parameters that have a gradient are among these."""
        held = set(map(id, parameters))
        return all(id(self._params[index]) in held for index in self._core.written())

    def prepare_step(self, scaler: Any = None) -> Tensor:
        # Every micro-batch may have failed, and somebody may have gone on all the same.
        if self._prepared is None and self.micro_batches == 0 and self._reduction.is_alone:
            zero = torch.zeros((), device=self.device)
            self._prepared = (zero, torch.ones_like(zero, dtype=torch.float64), zero)
        return super().prepare_step(scaler)

    def prepare_unclipped(self, scaler: Any) -> Tensor:
        """prepare_step() for those who clip in another way, where nobody has prepared it yet."""
        if self._prepared is None:
            self.max_norm = None
        return self.prepare_step(scaler)

    def _inverse_scale(self, scaler: Any) -> Tensor | None:
        inverse_scale = super()._inverse_scale(scaler)
        weight = self._core.weight()
        return weight if inverse_scale is None else weight * inverse_scale.to(weight.device)

    def show_gradients(self) -> None:
        """Puts the gradient into ``.grad``: normalised, clipped, and for the step to take."""
        self._show()

    def with_sums_so_far(self, function: Callable[[], Any]) -> Any:
        """Calls a function between two micro-batches that finds the sums so far in ``.grad``.

        They are the Trainer's own numbers, scaled by a GradScaler as its are. The window goes on
        with what the function leaves there.
        """
        set_aside = [param.grad for param in self._params]
        visible = VisibleGradients(self._core, self._params)
        self.is_between_micro_batches = True
        try:
            visible.show(torch.ones((), dtype=torch.float64, device=self.device))
            result = function()
            visible.take_back()
        except BaseException:
            self.reset()
            raise
        finally:
            self.is_between_micro_batches = False
            for param, grad in zip(self._params, set_aside, strict=True):
                param.grad = grad
        return result
