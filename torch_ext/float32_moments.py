"""float32 moments of bf16 and fp16 parameters, in the optimizer's own state.

torch.optim makes moments in the parameters' dtype, where squares of fp16 gradients are 0. The
accumulator's steps keep them in float32; torch's own ``load_state_dict()`` and ``step()`` would
round them, or refuse them, and get hooks for it here.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_ext.freed_memory import check_readable

__all__ = [
    "LOW_PRECISION",
    "is_own_hook",
    "keep_float32_moments",
    "local_tensor",
    "moment",
    "step_count",
    "widen_moments",
]

LOW_PRECISION = (torch.bfloat16, torch.float16)

_keeps_moments: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that lies here; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def moment(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    """A state tensor of the parameter's shape, created as torch.optim does, but never narrower than
    float32; of the dtype and device that the parameter has now."""
    found = state.get(name)
    if found is None:
        found = torch.zeros_like(param, memory_format=torch.preserve_format)
    dtype = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
    if found.dtype != dtype or found.device != param.device:
        check_readable(local_tensor(found), f"the optimizer's {name}")
        found = found.to(param.device, dtype)
    state[name] = found
    return local_tensor(found)


def step_count(state: dict[str, Any], group: dict[str, Any], param: Tensor) -> Tensor:
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


def widen_moments(state: dict[str, Any] | None) -> None:
    """For a step that takes the parameter as its float32 master."""
    for name, value in (state or {}).items():
        if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
            check_readable(local_tensor(value), f"the optimizer's {name}")
            state[name] = value.float()  # type: ignore[index]


def _is_torchs(optimizer: Optimizer) -> bool:
    return any(
        base is not Optimizer and base.__module__.startswith("torch.optim.")
        for base in type(optimizer).__mro__
    )


def _narrow_moments(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step of torch's own on bf16 and fp16 parameters, which expects moments of their
    dtype."""
    if torch.compiler.is_compiling() or not _is_torchs(optimizer):
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.dtype not in LOW_PRECISION:
                continue
            for name, value in optimizer.state.get(param, {}).items():
                if (
                    name != "step"
                    and isinstance(value, Tensor)
                    and value.dtype == torch.float32
                    and value.shape == param.shape
                ):
                    optimizer.state[param][name] = value.to(param.dtype)


def is_own_hook(hook: Any) -> bool:
    """Whether a step hook is this package's, and may be passed by."""
    return hook is _narrow_moments or hasattr(hook, "torch_ext_own")


_narrows_moments = False


def keep_float32_moments(optimizer: Optimizer) -> None:
    """Lets ``optimizer.load_state_dict()`` keep float32 moments of bf16 and fp16 parameters.

    torch.optim rounds them to the parameters' dtype, and a resumed run would differ from one that
    was never interrupted. From the first such optimizer on torch's own steps round them, where they
    would refuse them.
    """
    global _narrows_moments
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if optimizer in _keeps_moments or not any(param.dtype in LOW_PRECISION for param in params):
        return
    _keeps_moments.add(optimizer)
    if not _narrows_moments:
        # Of all optimizers: copies of one have none of its hooks, but its moments.
        _narrows_moments = True
        register_optimizer_step_pre_hook(_narrow_moments)
    loaded: list[dict[str, Any]] = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loaded[:] = [state_dict]

    def after(optimizer: Optimizer) -> None:
        state_dict = loaded.pop()
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if param.dtype not in LOW_PRECISION:
                continue
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.dtype == torch.float32:
                    optimizer.state[param][name] = value.detach().clone().to(param.device)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
