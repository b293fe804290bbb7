"""What GradientAccumulator is made of and called with, and every refusal of what it cannot take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from torch_ext.gradient_reduction import unwrapped
from torch_ext.optimizer_steps import innermost_optimizer

__all__ = [
    "NAME",
    "MicroBatchWeight",
    "check_dtype",
    "check_independent_micro_batches",
    "check_models",
    "check_optimizers",
    "check_state",
    "is_number",
    "named_parameters",
]

NAME = "torch_ext.GradientAccumulator"

# c10::ScalarType
_DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def is_number(value: Any) -> TypeGuard[float]:
    """Python's and NumPy's numbers; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_dtype(dtype: torch.dtype) -> int:
    if dtype not in _DTYPE_CODES:
        raise ValueError(
            f"{NAME}: dtype takes torch.float32, float64, bfloat16 or float16, got {dtype}"
        )
    return _DTYPE_CODES[dtype]


def check_models(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    models = list(model) if isinstance(model, Iterable) else []
    for one in models or [model]:
        if not isinstance(one, nn.Module):
            raise TypeError(
                f"{NAME}: model takes an nn.Module, or several, got {type(one).__name__}"
            )
    return models


def named_parameters(models: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Those that have or may get gradients."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for number, model in enumerate(models):
        prefix = f"{number}." if len(models) > 1 else ""
        for name, param in unwrapped(model).named_parameters(prefix.rstrip(".")):
            if isinstance(param, nn.parameter.UninitializedTensorMixin):
                raise ValueError(
                    f"{NAME}: model takes initialised parameters, {name} is not: run a forward "
                    "first"
                )
            if param.device.type == "meta":
                raise ValueError(f"{NAME}: model takes parameters with memory, {name} is on meta")
            if id(param) not in seen and (param.dtype in _DTYPE_CODES or param.requires_grad):
                seen.add(id(param))
                found[name] = param
    if not found:
        raise ValueError(f"{NAME}: model takes a module with parameters, got one without")
    return found


def check_optimizers(
    optimizer: Optimizer | Iterable[Optimizer], parameters: Mapping[str, Tensor]
) -> tuple[list[Optimizer], list[Optimizer]]:
    """The optimizers as they were given, and those that accelerate has wrapped themselves."""
    is_list = not isinstance(optimizer, Optimizer) and isinstance(optimizer, Iterable)
    given: list[Optimizer] = list(optimizer) if is_list else [optimizer]
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"{NAME}: optimizer takes a torch.optim.Optimizer, or several, got "
                f"{type(one).__name__}"
            )
    optimizers = [innermost_optimizer(one) for one in given]
    names = {id(param): name for name, param in parameters.items()}
    held: set[int] = set()
    for one in optimizers:
        own = [param for group in one.param_groups for param in group["params"]]
        twice = [names.get(id(param), "one") for param in own if id(param) in held]
        if twice:
            raise ValueError(
                f"{NAME}: optimizer takes optimizers that share no parameters, got two that hold "
                f"{twice[0]}{_and_more(twice)}"
            )
        held.update(map(id, own))
    missing = [
        name for name, param in parameters.items() if param.requires_grad and id(param) not in held
    ]
    if missing:
        raise ValueError(
            f"{NAME}: optimizer takes one that holds the model's parameters, got one without "
            f"{missing[0]}{_and_more(missing)}: give a list of optimizers where several share them"
        )
    foreign = [
        f"one of sizes {tuple(param.shape)}"
        for one in optimizers
        for group in one.param_groups
        for param in group["params"]
        if id(param) not in names
    ]
    if foreign:
        raise ValueError(
            f"{NAME}: optimizer takes one that holds the model's parameters only, got others: "
            f"{foreign[0]}{_and_more(foreign)}: give a list of models where it trains several"
        )
    return given, optimizers


def _and_more(items: list[str]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def check_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the tensors themselves, which the core checks."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{NAME}: load_state_dict() takes a dict of tensors, got {type(state_dict).__name__}"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(
                f"{NAME}: load_state_dict() takes names of entries, got {key!r}, "
                f"of {type(key).__name__}"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{NAME}: load_state_dict() '{key}' takes a tensor, got {type(value).__name__}"
            )
    return dict(state_dict)


class MicroBatchWeight:
    """A checked micro-batch weight: a number, or a tensor on a device that is not waited for."""

    __slots__ = ("number", "tensor")

    def __init__(self, weight: float | Tensor, device: torch.device) -> None:
        self.number = 0.0
        self.tensor: Tensor | None = None
        if isinstance(weight, Tensor):
            if weight.numel() != 1 or weight.is_complex():
                raise ValueError(
                    f"{NAME}: weight takes a number >= 0 or a real tensor of one element, got "
                    f"{weight.dtype} of sizes {tuple(weight.shape)}"
                )
            if weight.device.type != "cpu":
                self.tensor = weight.detach().reshape(()).to(device, torch.float64, copy=True)
                return
            weight = weight.item()
        if not is_number(weight):
            raise TypeError(
                f"{NAME}: weight takes a number >= 0 or a tensor of one element, got "
                f"{type(weight).__name__}"
            )
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{NAME}: weight takes a finite number >= 0, got {weight}")
        self.number = float(weight)


def check_independent_micro_batches(name: str, model: nn.Module) -> None:
    """Refuses layers whose state each micro-batch changes."""
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            raise ValueError(
                f"{name}: model takes one whose micro-batches do not depend on each other, got "
                f"{type(module).__name__} {path} with running statistics: call its eval(), or run "
                "micro-batches one after the other"
            )
