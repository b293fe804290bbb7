"""Clipping of a window's gradient, as torch.nn.utils clips what lies in ``.grad``."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from torch_ext.gradient_reduction import Reduction

__all__ = ["GradientClipping"]

_NAME = "torch_ext.GradientAccumulator"

# As torch.nn.utils.clip_grad_norm_ has it.
_EPSILON = 1e-6

Prepared = tuple[Tensor, Tensor, Tensor]
"""norm, coefficient, found_inf"""


def _checked(name: str, value: Any) -> float | None:
    """A number > 0; None stays."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{_NAME}: {name} takes a number > 0 or None, got {value!r}")
    if not float(value) > 0.0:
        raise ValueError(f"{_NAME}: {name} takes a number > 0 or None, got {value}")
    return float(value)


def _checked_norm_type(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise TypeError(f"{_NAME}: norm_type takes a number, got {value!r}")
    return float(value)


class GradientClipping:
    """clip_grad_norm_(max_norm, norm_type, error_if_nonfinite), then clip_grad_value_(clip_value).

    The 2-norm costs nothing: the step needs it anyway, and multiplies the gradients while it reads
    them. Another norm is one more read of the sums, clip_value one more pass.
    """

    def __init__(
        self, max_norm: Any, norm_type: Any, clip_value: Any, error_if_nonfinite: bool
    ) -> None:
        self.max_norm = max_norm
        self._norm_type = _checked_norm_type(norm_type)
        self._clip_value = _checked("clip_value", clip_value)
        self.error_if_nonfinite = error_if_nonfinite

    @property
    def max_norm(self) -> float | None:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: Any) -> None:
        self._max_norm = _checked("max_norm", max_norm)

    def options(self) -> dict[str, Any]:
        """The constructor's."""
        return {
            "max_norm": self._max_norm,
            "norm_type": self._norm_type,
            "clip_value": self._clip_value,
            "error_if_nonfinite": self.error_if_nonfinite,
        }

    def prepare(self, core: Any, reduction: Reduction, inverse_scale: Tensor | None) -> Prepared:
        """What a step takes, clipped by norm; the norm is of the unclipped gradient."""
        if self._norm_type == 2.0:
            return reduction.prepare_step(core, inverse_scale, self._max_norm)
        return self._by_other_norm(core, reduction, inverse_scale)

    def check_finite(self, norm: Tensor) -> None:
        if self.error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"{_NAME}: The total norm of order {self._norm_type} for gradients is non-finite, "
                "so it cannot be clipped. To step where it is finite and to skip where it is not, "
                "leave error_if_nonfinite=False"
            )

    @torch.no_grad()
    def _by_other_norm(
        self, core: Any, reduction: Reduction, inverse_scale: Tensor | None
    ) -> Prepared:
        norm, coefficient, found_inf = reduction.prepare_step(core, inverse_scale, None)
        sums = core.sums(core.written())
        total = get_total_norm(sums, self._norm_type) if sums else torch.zeros_like(norm)
        total = reduction.join_norms(total.to(norm.device), self._norm_type)
        # |c x|_p = c |x|_p, but for p = 0, which counts.
        scaled = total.double() * (coefficient if self._norm_type != 0.0 else 1.0)
        if self._max_norm is not None:
            coefficient = coefficient * (self._max_norm / (scaled + _EPSILON)).clamp(max=1.0)
        return scaled.to(norm.dtype), coefficient, found_inf

    @torch.no_grad()
    def clip_values(self, core: Any, coefficient: Tensor) -> Tensor:
        """Clips each element of the normalised gradient; returns the coefficient that is left."""
        if self._clip_value is None:
            return coefficient
        sums = core.sums(core.written())
        if sums:
            torch._foreach_mul_(sums, coefficient)
            torch._foreach_clamp_min_(sums, -self._clip_value)
            torch._foreach_clamp_max_(sums, self._clip_value)
        return torch.ones_like(coefficient)
