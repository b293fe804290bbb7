"""What torch.amp.GradScaler is asked and told where an accumulator steps in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["inverse_scale", "is_on", "record_step"]

_NAME = "torch_ext.GradientAccumulator"


def is_on(scaler: Any) -> bool:
    return scaler is not None and scaler.is_enabled()


def inverse_scale(scaler: Any) -> Tensor | None:
    if not is_on(scaler):
        return None
    if scaler._scale is None:
        raise RuntimeError(
            f"{_NAME}: step(): scaler takes one that has scaled the losses: call "
            "scaler.scale(loss).backward() inside micro_batch()"
        )
    return scaler._scale.double().reciprocal()


def record_step(scaler: Any, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Tells the scaler's update() what its own step() would have."""
    from torch.amp.grad_scaler import OptState

    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError(f"{_NAME}: step(): call scaler.update() after each step")
    state["found_inf_per_device"] = {found_inf.device: found_inf}
    state["stage"] = OptState.STEPPED
