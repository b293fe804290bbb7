"""What several processes do about a window's sums: nothing here, DistributedDataParallel, FSDP2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Reduction", "reduction_of", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, whose names its state has."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        elif type(model).__name__ == "DistributedDataParallel":
            model = model.module
        else:
            return model


class Reduction:
    """One process: the sums are complete.

    Attributes:
        takes_grads: whether micro-batches leave their gradients in the parameters' ``.grad``, as
            plain tensors; else :meth:`collect` brings them.
        leaves_node_hooks: whether the hooks on autograd's accumulation nodes do without gradients.
    """

    takes_grads = True
    leaves_node_hooks = False

    def enter_micro_batch(self) -> None:
        pass

    def leave_micro_batch(self) -> None:
        pass

    def collect(self, core: Any, params: list[Tensor]) -> None:
        pass

    def prepare_step(
        self, core: Any, inverse_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(norm, coefficient, found_inf) of the step."""
        return core.prepare_step(1.0, inverse_scale, max_norm)


def reduction_of(model: nn.Module, params: list[Tensor]) -> Reduction:
    return Reduction()
