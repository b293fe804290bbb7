"""How a window's sums reach the optimizers: AdamW, Adam and SGD fused, others through .grad.

The fused steps keep ``optimizer.state`` the one torch.optim would have, so that schedulers,
checkpoints and the optimizer's own ``step()`` go on as ever. Two things differ, both for bf16 and
fp16 parameters, whatever the optimizer: the moments are float32 (in fp16 their squares would be 0),
and the parameters have float32 masters, which the accumulator's own state keeps.
"""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_ext._C import run_then_clean_up
from torch_ext.float32_moments import (
    LOW_PRECISION,
    is_own_hook,
    keep_float32_moments,
    local_tensor,
    moment,
    step_count,
    widen_moments,
)

__all__ = ["OptimizerSteps", "innermost_optimizer", "like_parameter", "local_tensor"]

_NAME = "torch_ext.GradientAccumulator"

_adamw_step = torch.ops.torch_ext.adamw_step_
_sgd_step = torch.ops.torch_ext.sgd_step_

_FUSED = (AdamW, Adam, SGD)


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, whose steps count micro-batches themselves."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_post_hooks
        or _global_optimizer_post_hooks
        or not all(map(is_own_hook, optimizer._optimizer_step_pre_hooks.values()))
        or not all(map(is_own_hook, _global_optimizer_pre_hooks.values()))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # NumPy's too


def _rate(group: dict[str, Any]) -> Any:
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else float(lr)


def _is_plain_adam(group: dict[str, Any]) -> bool:
    return all(map(_is_number, (*group["betas"], group["eps"], group["weight_decay"])))


def _is_plain_sgd(group: dict[str, Any]) -> bool:
    return all(map(_is_number, (group["momentum"], group["dampening"], group["weight_decay"])))


class OptimizerSteps:
    """Steps optimizers with the sums of one core.

    Args:
        optimizers: any of torch.optim's, or like them; bare, without accelerate's wrapper.
        core: the sums.
        params: the core's parameters, in its order.
        names: theirs, for messages.
    """

    def __init__(
        self, optimizers: list[Optimizer], core: Any, params: list[Tensor], names: list[str]
    ) -> None:
        self._core = core
        self._params = params
        self._names = names
        self._index_of = {id(param): index for index, param in enumerate(params)}
        self._steps = [_OptimizerStep(one, core, params, self._index_of) for one in optimizers]

    def __call__(self, coefficient: Tensor, found_inf: Tensor) -> None:
        """Steps with ``coefficient * sum`` for every parameter that has a sum."""
        written = set(self._core.written())
        held: set[int] = set()
        for step in self._steps:
            held |= step.held()
        if not held <= self._index_of.keys():
            raise RuntimeError(
                f"{_NAME}: step(): the optimizer has been given parameters that are not the "
                "model's: make an accumulator for both"
            )
        for index in sorted(written):
            if id(self._params[index]) not in held:
                raise RuntimeError(
                    f"{_NAME}: step(): {self._names[index]} has a gradient, but the optimizer does "
                    "not hold it: freeze it, or add it to the optimizer"
                )
        for step in self._steps:
            step(written, coefficient, found_inf)


class _OptimizerStep:
    def __init__(
        self, optimizer: Optimizer, core: Any, params: list[Tensor], index_of: dict[int, int]
    ) -> None:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{_NAME}: optimizer takes one that steps without a closure, got "
                f"{type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        self._core = core
        self._params = params
        self._index_of = index_of
        if type(optimizer) not in _FUSED and any(
            local_tensor(param) is not param and param.dtype in LOW_PRECISION for param in params
        ):
            warnings.warn(
                f"{_NAME}: the bf16 and fp16 shards of fully_shard have no float32 masters with "
                f"{type(optimizer).__name__}: AdamW, Adam and SGD have, and so have float32 "
                "parameters with a MixedPrecisionPolicy",
                stacklevel=4,
            )

    def held(self) -> set[int]:
        return {id(param) for group in self._optimizer.param_groups for param in group["params"]}

    def __call__(self, written: set[int], coefficient: Tensor, found_inf: Tensor) -> None:
        # What a scheduler asks for before it says that it was called too early.
        self._optimizer._opt_called = True
        if coefficient.device.type == "cpu" and found_inf.item() != 0.0:
            return
        groups = [
            (group, [i for param in group["params"] if (i := self._index_of[id(param)]) in written])
            for group in self._optimizer.param_groups
        ]
        with torch.no_grad():
            step = self._fused_step()
            if step is None:
                indices = [index for _, indices in groups for index in indices]
                if indices and found_inf.item() == 0.0:
                    self._step_through_grad(indices, coefficient)
                return
            for group, indices in groups:
                if indices:
                    step(group, indices, coefficient, found_inf)

    def _fused_step(self) -> Callable[..., None] | None:
        """The fused step of this optimizer as it is set now."""
        groups = self._optimizer.param_groups
        # Not for subclasses, which may do more; nor past hooks, which may look at .grad; nor where
        # parameters lie over one another, which one pass over all of them cannot update in turn.
        kind = type(self._optimizer)
        if kind not in _FUSED or _has_step_hooks(self._optimizer) or self._core.shares_memory():
            return None
        if any(group["differentiable"] for group in groups):
            return None
        if kind is SGD:
            return self._sgd_step if all(map(_is_plain_sgd, groups)) else None
        return self._adam_step if all(map(_is_plain_adam, groups)) else None

    def _masters(self, params: list[Tensor], indices: list[int]) -> list[Tensor]:
        has_masters = any(param.dtype in LOW_PRECISION for param in params)
        return self._core.masters(indices) if has_masters else []

    def _adam_step(
        self, group: dict[str, Any], indices: list[int], coefficient: Tensor, found_inf: Tensor
    ) -> None:
        params = [self._params[index] for index in indices]
        states = [self._optimizer.state[param] for param in params]
        pairs = list(zip(states, params, strict=True))
        amsgrad = group["amsgrad"]
        lr = _rate(group)
        step = _adamw_step.tensor_lr if isinstance(lr, Tensor) else _adamw_step.default
        steps = [step_count(state, group, param) for state, param in pairs]
        step(
            [local_tensor(param) for param in params],
            self._core.sums(indices),
            [moment(state, "exp_avg", param) for state, param in pairs],
            [moment(state, "exp_avg_sq", param) for state, param in pairs],
            [moment(state, "max_exp_avg_sq", param) for state, param in pairs] if amsgrad else [],
            self._masters(params, indices),
            steps,
            lr=lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            amsgrad=amsgrad,
            maximize=group["maximize"],
            coefficient=coefficient,
            found_inf=found_inf,
            reset=False,
        )

    def _sgd_step(
        self, group: dict[str, Any], indices: list[int], coefficient: Tensor, found_inf: Tensor
    ) -> None:
        params = [self._params[index] for index in indices]
        momentum = group["momentum"]
        buffers: list[Tensor] = []
        first_step: list[bool] = []
        if momentum != 0:
            states = [self._optimizer.state[param] for param in params]
            first_step = [state.get("momentum_buffer") is None for state in states]
            if group["dampening"] == 0:
                # momentum * 0 + gradient: the same, and right too when the step is skipped where
                # the device alone knows that.
                first_step = []
            elif any(first_step) and found_inf.item() != 0.0:
                return
            buffers = [
                moment(state, "momentum_buffer", param)
                for state, param in zip(states, params, strict=True)
            ]
        lr = _rate(group)
        step = _sgd_step.tensor_lr if isinstance(lr, Tensor) else _sgd_step.default
        step(
            [local_tensor(param) for param in params],
            self._core.sums(indices),
            buffers,
            self._masters(params, indices),
            lr=lr,
            momentum=float(momentum),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
            coefficient=coefficient,
            found_inf=found_inf,
            reset=False,
        )

    def _step_through_grad(self, indices: list[int], coefficient: Tensor) -> None:
        sums = self._core.scale_sums(indices, coefficient)
        set_aside = [param.grad for param in self._params]
        lent = self._params_with_masters(indices)

        def step() -> None:
            for param in self._params:
                param.grad = None
            for index in lent:
                widen_moments(self._optimizer.state.get(self._params[index]))
            self._core.lend_masters(lent)
            for index, total in zip(indices, sums, strict=True):
                param = self._params[index]
                param.grad = like_parameter(total.to(param.dtype), param)
            with torch.enable_grad():
                self._optimizer.step()

        def put_back() -> None:
            self._core.take_masters_back()
            for param in self._params:
                param.grad = None  # its dtype may be the master's
            for param, grad in zip(self._params, set_aside, strict=True):
                param.grad = None  # its dtype may be the master's
                param.grad = grad

        run_then_clean_up(step, put_back)

    def _params_with_masters(self, indices: list[int]) -> list[int]:
        """Those whose masters take their places while an optimizer steps."""
        low = [index for index in indices if self._params[index].dtype in LOW_PRECISION]
        if low and self._core.shares_memory():
            return []
        if low:
            keep_float32_moments(self._optimizer)
        return [index for index in low if local_tensor(self._params[index]) is self._params[index]]


def like_parameter(local: Tensor, param: Tensor) -> Tensor:
    """The distributed tensor whose part here is ``local``, where the parameter is one."""
    if local_tensor(param) is param:
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
