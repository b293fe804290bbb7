"""How a window's sums reach an optimizer: AdamW, Adam and SGD fused, others through .grad.

The fused steps keep ``optimizer.state`` the one torch.optim would have, so that schedulers,
checkpoints and the optimizer's own ``step()`` go on as ever. Two things differ, both for bf16 and
fp16 parameters: the moments are float32 (in fp16 their squares would be 0), and the parameters have
float32 masters, which the accumulator's own state keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_ext._C import run_then_clean_up

__all__ = ["OptimizerStep", "keep_float32_moments", "like_parameter", "local_tensor"]

_adamw_step = torch.ops.torch_ext.adamw_step_
_sgd_step = torch.ops.torch_ext.sgd_step_

# Set on optimizers that have keep_float32_moments()' hooks.
_KEEPS_MOMENTS = "_torch_ext_keeps_float32_moments"

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that lies here; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_plain_adam(group: dict[str, Any]) -> bool:
    return all(map(_is_number, (*group["betas"], group["eps"], group["weight_decay"])))


def _is_plain_sgd(group: dict[str, Any]) -> bool:
    return all(map(_is_number, (group["momentum"], group["dampening"], group["weight_decay"])))


def _moment(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    """A state tensor of the parameter's shape, created as torch.optim does."""
    moment = state.get(name)
    if moment is None:
        moment = torch.zeros_like(param, memory_format=torch.preserve_format)
    if moment.dtype in _LOW_PRECISION:
        moment = moment.float()
    state[name] = moment
    return local_tensor(moment)


def _step_count(state: dict[str, Any], group: dict[str, Any], param: Tensor) -> Tensor:
    count = state.get("step")
    device = local_tensor(param).device
    if count is None:
        count = torch.zeros((), dtype=torch.float32, device=device)
    elif not isinstance(count, Tensor):
        count = torch.tensor(float(count), dtype=torch.float32, device=device)
    elif count.device != device:
        count = count.to(device)
    state["step"] = count
    return count


class OptimizerStep:
    """Steps one optimizer with the sums of one core.

    Args:
        optimizer: any of torch.optim's, or one like them.
        core: the sums.
        params: the core's parameters, in its order.
        names: theirs, for messages.
    """

    def __init__(
        self, optimizer: Optimizer, core: Any, params: list[Tensor], names: list[str]
    ) -> None:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                "torch_ext.GradientAccumulator: optimizer takes one that steps without a closure, "
                f"got {type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        self._core = core
        self._params = params
        self._names = names
        self._index_of = {id(param): index for index, param in enumerate(params)}
        self._has_masters = any(param.dtype in _LOW_PRECISION for param in params)

    def __call__(self, coefficient: Tensor, found_inf: Tensor) -> None:
        """Steps with ``coefficient * sum`` for every parameter that has a sum."""
        written = self._core.written()
        self._check_held(written)
        # What a scheduler asks for before it says that it was called too early.
        self._optimizer._opt_called = True
        if coefficient.device.type == "cpu" and found_inf.item() != 0.0:
            return
        with torch.no_grad():
            step = self._fused_step()
            if step is None:
                self._step_through_grad(written, coefficient, found_inf)
                return
            present = set(written)
            for group in self._optimizer.param_groups:
                indices = [
                    index
                    for param in group["params"]
                    if (index := self._index_of[id(param)]) in present
                ]
                if indices:
                    step(group, indices, coefficient, found_inf)

    def _check_held(self, written: Iterable[int]) -> None:
        held = {id(param) for group in self._optimizer.param_groups for param in group["params"]}
        if not held <= self._index_of.keys():
            raise RuntimeError(
                "torch_ext.GradientAccumulator: step(): the optimizer has been given parameters "
                "that are not the model's: make an accumulator for both"
            )
        for index in written:
            if id(self._params[index]) not in held:
                raise RuntimeError(
                    f"torch_ext.GradientAccumulator: step(): {self._names[index]} has a gradient, "
                    "but the optimizer does not hold it: freeze it, or add it to the optimizer"
                )

    def _fused_step(self) -> Callable[..., None] | None:
        """The fused step of this optimizer as it is set now."""
        groups = self._optimizer.param_groups
        # Not for subclasses, which may do more; nor past hooks, which may look at .grad.
        kind = type(self._optimizer)
        if kind not in (AdamW, Adam, SGD) or _has_step_hooks(self._optimizer):
            return None
        if any(group["differentiable"] for group in groups):
            return None
        if kind is SGD:
            return self._sgd_step if all(map(_is_plain_sgd, groups)) else None
        return self._adam_step if all(map(_is_plain_adam, groups)) else None

    def _masters(self, indices: list[int]) -> list[Tensor]:
        return self._core.masters(indices) if self._has_masters else []

    def _adam_step(
        self, group: dict[str, Any], indices: list[int], coefficient: Tensor, found_inf: Tensor
    ) -> None:
        params = [self._params[index] for index in indices]
        states = [self._optimizer.state[param] for param in params]
        pairs = list(zip(states, params, strict=True))
        amsgrad = group["amsgrad"]
        lr = group["lr"]
        step = _adamw_step.tensor_lr if isinstance(lr, Tensor) else _adamw_step.default
        steps = [_step_count(state, group, param) for state, param in pairs]
        step(
            [local_tensor(param) for param in params],
            self._core.sums(indices),
            [_moment(state, "exp_avg", param) for state, param in pairs],
            [_moment(state, "exp_avg_sq", param) for state, param in pairs],
            [_moment(state, "max_exp_avg_sq", param) for state, param in pairs] if amsgrad else [],
            self._masters(indices),
            steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            amsgrad=amsgrad,
            maximize=group["maximize"],
            coefficient=coefficient,
            found_inf=found_inf,
            reset=False,
        )
        if self._has_masters:
            self._core.mark_stepped(indices)

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
                _moment(state, "momentum_buffer", param)
                for state, param in zip(states, params, strict=True)
            ]
        lr = group["lr"]
        step = _sgd_step.tensor_lr if isinstance(lr, Tensor) else _sgd_step.default
        step(
            [local_tensor(param) for param in params],
            self._core.sums(indices),
            buffers,
            self._masters(indices),
            lr=lr,
            momentum=momentum,
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
            coefficient=coefficient,
            found_inf=found_inf,
            reset=False,
        )
        if self._has_masters:
            self._core.mark_stepped(indices)

    def _step_through_grad(
        self, written: list[int], coefficient: Tensor, found_inf: Tensor
    ) -> None:
        if found_inf.item() != 0.0:
            return
        sums = self._core.scale_sums(written, coefficient)
        set_aside = [param.grad for param in self._params]
        self._narrow_moments()

        def step() -> None:
            for param in self._params:
                param.grad = None
            for index, total in zip(written, sums, strict=True):
                param = self._params[index]
                param.grad = like_parameter(total.to(param.dtype), param)
            with torch.enable_grad():
                self._optimizer.step()

        def put_back() -> None:
            for param, grad in zip(self._params, set_aside, strict=True):
                param.grad = grad

        run_then_clean_up(step, put_back)

    def _narrow_moments(self) -> None:
        """What a fused step has widened: other steps expect the parameters' dtype."""
        if not self._has_masters or type(self._optimizer) not in (AdamW, Adam, SGD):
            return
        for param, state in self._optimizer.state.items():
            if param.dtype in _LOW_PRECISION:
                for name, value in state.items():
                    if name != "step" and isinstance(value, Tensor):
                        state[name] = value.to(param.dtype)


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


def keep_float32_moments(optimizer: Optimizer) -> None:
    """Lets ``optimizer.load_state_dict()`` keep float32 moments of bf16 and fp16 parameters.

    torch.optim rounds them to the parameters' dtype, and a resumed run would differ from one that
    was never interrupted.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if type(optimizer) not in (AdamW, Adam, SGD):
        return
    if not any(param.dtype in _LOW_PRECISION for param in params):
        return
    if hasattr(optimizer, _KEEPS_MOMENTS):
        return
    setattr(optimizer, _KEEPS_MOMENTS, True)
    loaded: list[dict[str, Any]] = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loaded[:] = [state_dict]

    def after(optimizer: Optimizer) -> None:
        state_dict = loaded.pop()
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if param.dtype not in _LOW_PRECISION:
                continue
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.dtype == torch.float32:
                    optimizer.state[param][name] = value.detach().clone().to(param.device)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
