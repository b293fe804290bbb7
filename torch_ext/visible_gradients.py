"""A window's gradient in ``.grad`` for a while, for those who read or edit it before the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_ext.freed_memory import check_readable
from torch_ext.optimizer_steps import like_parameter, local_tensor

__all__ = ["VisibleGradients"]


class VisibleGradients:
    """Scales the sums to the gradient that the step will take, and puts them into ``.grad``.

    Where the dtypes agree ``.grad`` is the sum itself. A narrower parameter's is a copy: a sum
    keeps its own digits but for elements whose copy is edited.

    Args:
        core: the sums.
        params: the core's parameters, in its order.
    """

    def __init__(self, core: Any, params: list[Tensor]) -> None:
        self._core = core
        self._params = params

    def show(self, coefficient: Tensor) -> None:
        """From here on the step's coefficient is 1."""
        written = self._core.written()
        sums = self._core.scale_sums(written, coefficient)
        for param in self._params:
            param.grad = None
        for index, total in zip(written, sums, strict=True):
            param = self._params[index]
            param.grad = like_parameter(total.to(param.dtype), param)

    @torch.no_grad()
    def take_back(self) -> None:
        """The sums become what ``.grad`` holds now; ``.grad`` keeps it."""
        written = self._core.written()
        self._core.forget([index for index in written if self._params[index].grad is None])
        present = [index for index, param in enumerate(self._params) if param.grad is not None]
        for index in present:
            check_readable(local_tensor(self._params[index].grad), "an edited .grad")
        self._core.zero_missing(present)
        for index, total in zip(present, self._core.sums(present), strict=True):
            grad = local_tensor(self._params[index].grad)
            if grad.data_ptr() == total.data_ptr() and grad.dtype == total.dtype:
                continue  # edited in place
            total.copy_(torch.where(total.to(grad.dtype) == grad, total, grad.to(total.dtype)))
