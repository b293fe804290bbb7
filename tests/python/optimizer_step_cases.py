"""adamw_step_ and sgd_step_ as torch.optim has them: parameters and state in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accumulation_cases import OPS, nonzero
from torch import Tensor

SHAPES = ((3, 5), (1,), (), (70,), (17, 33), (0, 4), (2, 3, 4))


@dataclass
class FusedAdam:
    """A list of parameters, stepped by adamw_step_."""

    params: list[Tensor]
    amsgrad: bool = False
    state_dtype: torch.dtype | None = None  # the parameter's
    master_dtype: torch.dtype | None = None  # none
    accumulators: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def zeros() -> list[Tensor]:
            return [torch.zeros_like(p, dtype=self.state_dtype or p.dtype) for p in self.params]

        self.accumulators = []
        self.exp_avgs, self.exp_avg_sqs = zeros(), zeros()
        self.max_exp_avg_sqs = zeros() if self.amsgrad else []
        self.masters = (
            [p.to(self.master_dtype, copy=True) for p in self.params] if self.master_dtype else []
        )
        self.steps = [torch.zeros(()) for _ in self.params]

    def step(self, grads: Sequence[Tensor], lr: float | Tensor = 1e-2, **options: Any) -> None:
        self.accumulators = list(grads)
        OPS.adamw_step_(
            self.params,
            self.accumulators,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs,
            self.masters,
            self.steps,
            lr=lr,
            amsgrad=self.amsgrad,
            **options,
        )

    def tensors(self) -> list[Tensor]:
        return [
            *self.params,
            *self.exp_avgs,
            *self.exp_avg_sqs,
            *self.max_exp_avg_sqs,
            *self.masters,
            *self.steps,
        ]


@dataclass
class FusedSgd:
    """A list of parameters, stepped by sgd_step_."""

    params: list[Tensor]
    momentum: float = 0.0
    master_dtype: torch.dtype | None = None
    accumulators: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.accumulators = []
        # Never read before it is written.
        self.buffers = (
            [torch.full_like(p, float("nan")) for p in self.params] if self.momentum else []
        )
        self.masters = (
            [p.to(self.master_dtype, copy=True) for p in self.params] if self.master_dtype else []
        )
        self.is_first = True

    def step(self, grads: Sequence[Tensor], lr: float | Tensor = 1e-2, **options: Any) -> None:
        self.accumulators = list(grads)
        OPS.sgd_step_(
            self.params,
            self.accumulators,
            self.buffers,
            self.masters,
            lr=lr,
            momentum=self.momentum,
            first_step=[self.is_first] * len(self.params) if self.momentum else [],
            **options,
        )
        self.is_first = False

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.buffers, *self.masters]


def random_tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nonzero(*shape, dtype=dtype) for shape in SHAPES]


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """Parameters for torch.optim, of the same values."""
    return [torch.nn.Parameter(t.detach().to(dtype or t.dtype, copy=True)) for t in tensors]


def torch_step(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]
) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.detach().to(param.dtype, copy=True)
    optimizer.step()


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], eps: float) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            mine.double(), theirs.detach().double(), rtol=4 * eps, atol=4 * eps
        )
