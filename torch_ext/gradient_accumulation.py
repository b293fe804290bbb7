"""Mini-batch training: micro-batches of any sizes, summed into one optimizer step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_ext._C import InterruptibleScope, run_then_clean_up
from torch_ext.accumulating_layers import AccumulatingLayers
from torch_ext.accumulator_arguments import (
    NAME,
    MicroBatchWeight,
    check_dtype,
    check_independent_micro_batches,
    check_max_norm,
    check_optimizer,
    check_state,
    named_parameters,
)
from torch_ext.gradient_reduction import Reduction, reduction_of
from torch_ext.optimizer_steps import OptimizerStep, keep_float32_moments, local_tensor

__all__ = ["GradientAccumulator", "MicroBatch"]


# One for each time that a micro-batch is entered.
_tickets = itertools.count(1)


class MicroBatch(InterruptibleScope):
    """The context of one micro-batch, from :meth:`GradientAccumulator.micro_batch`."""

    def __init__(self, accumulator: GradientAccumulator, weight: float | Tensor) -> None:
        super().__init__()
        self._accumulator = accumulator
        self._ticket = 0
        self.weight = weight

    @property
    def weight(self) -> float | Tensor:
        """May be set until the context ends, for a weight that the forward pass finds out."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Tensor) -> None:
        self._checked = MicroBatchWeight(weight, self._accumulator.device)
        self._weight = weight

    def _enter(self) -> None:
        self._ticket = next(_tickets)
        self._accumulator._open(self._ticket)

    def _exit(self, failed: bool) -> None:
        if failed:
            self._restore()
        else:
            self._accumulator._close(self._checked)

    def _restore(self) -> None:
        self._accumulator._abandon(self._ticket)


class GradientAccumulator:
    """Sums the gradients of micro-batches and steps once: normalise, clip and update in one pass.

        accumulator = torch_ext.GradientAccumulator(model, optimizer, max_norm=1.0)
        for micro_batch in micro_batches:
            with accumulator.micro_batch(weight=n_tokens):
                loss_sum(model(x), y).backward()
        norm = accumulator.step()

    The step is that of one large batch with the mean loss, whatever the micro-batches' sizes.
    AdamW, Adam and SGD of torch.optim run fused; any other optimizer gets the gradient in
    ``.grad``. The optimizer's ``state_dict`` stays the one torch.optim would have.

    Args:
        model: the module that is trained; DistributedDataParallel, FSDP2 (``fully_shard``) and
            torch.compile'd ones too.
        optimizer: holds the model's parameters, and no others.
        dtype: of the sums. float64 parameters are summed in float64 at least.
        max_norm: clips the gradient's global norm; None: not clipped.
        fuse_linear: ``nn.Linear`` and ``nn.Embedding`` add their weights' gradients to the sums
            inside their backward, without writing the gradients first, and other large gradients
            are added as soon as they are complete. With False ``.grad`` holds all of a
            micro-batch's gradients until it ends, to look at or to change.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it takes and what it got.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        max_norm: float | None = None,
        fuse_linear: bool = True,
    ) -> None:
        code = check_dtype(dtype)
        self._max_norm = check_max_norm(max_norm)
        parameters = named_parameters(model)
        check_optimizer(optimizer, parameters)
        self._model = model
        self._optimizer = optimizer
        self._dtype = dtype
        self._dtype_code = code
        self._fuse_linear = fuse_linear
        self._names = list(parameters)
        self._params: list[Tensor] = list(parameters.values())
        self._reduction: Reduction = reduction_of(model, self._params, self._names)
        self.device = local_tensor(self._params[0]).device
        self._core = self.new_core()
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None
        self._step = OptimizerStep(optimizer, self._core, self._params, self._names)
        keep_float32_moments(optimizer)
        self._core.ignore_node_hooks(self._reduction.leaves_node_hooks)
        self._core.add_in_backward(fuse_linear)
        self._layers: AccumulatingLayers | None = None
        if fuse_linear and self._reduction.takes_grads:
            index_of = {id(param): index for index, param in enumerate(self._params)}
            layers = AccumulatingLayers(model, self._core, index_of, self.device)
            self._layers = layers if len(layers) else None

    def new_core(self) -> Any:
        """Another window for the same parameters, empty: for parallel micro-batches."""
        return torch.classes.torch_ext.AccumulatorCore(
            [local_tensor(param) for param in self._params],
            self._names,
            self._dtype_code,
            self._reduction.takes_grads,
        )

    @property
    def model(self) -> nn.Module:
        """The module as it was given."""
        return self._model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer as it was given."""
        return self._optimizer

    @property
    def max_norm(self) -> float | None:
        """The norm that the gradient is clipped to; may be set between steps."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float | None) -> None:
        self._max_norm = check_max_norm(max_norm)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches the window holds so far, on this process."""
        return self._core.micro_batches()

    @property
    def gradient_noise_scale(self) -> Tensor:
        """The batch size, in units of weight, beyond which larger batches help little.

        The simple noise scale of McCandlish et al. 2018 (appendix A.1), from the norms of the
        windows' first micro-batches and of the whole windows, averaged over about 20 windows. NaN
        until a window of two micro-batches has been stepped.
        """
        return self._core.noise_scale()

    def micro_batch(self, weight: float | Tensor = 1.0) -> MicroBatch:
        """The context in which one micro-batch's ``backward()`` is called, on the summed loss.

        Args:
            weight: what the summed loss is to be divided by in the end: its number of tokens or
                examples, >= 0. The step divides by the sum of all micro-batches' weights. With mean
                losses of micro-batches of one size leave it at 1.

        Hooks and ``torch.autograd.grad`` work inside as ever. What ``.grad`` held before it holds
        again afterwards. A micro-batch that ends with an exception leaves no trace, unless its
        backward had begun to add to the sums of earlier ones: then ``reset()`` has to be called.
        Ctrl-C is such an exception, wherever it comes.
        """
        return MicroBatch(self, weight)

    def parameters(self) -> list[Tensor]:
        """The model's parameters, in the order of the sums."""
        return self._params

    def merge(self, core: Any) -> None:
        """Adds another window of :meth:`new_core`'s, and empties it."""
        self._check_not_prepared()
        self._core.merge(core)

    def check_parallel(self, name: str) -> None:
        """Refuses, for the function ``name``, what cannot run micro-batches side by side."""
        self._check_not_prepared()
        if self._core.is_open():
            raise RuntimeError(f"{name}: a micro_batch() is open: end it first")
        self._reduction.check_parallel(name)
        check_independent_micro_batches(name, self._model)

    def _check_not_prepared(self) -> None:
        if self._prepared is not None:
            raise RuntimeError(f"{NAME}: a micro-batch after prepare_step(): call step() first")

    # A micro-batch is the core's between the first line of _open() and the last of _close() or of
    # _abandon(): wherever Ctrl-C comes in between, _abandon() finds something to take back.

    def _open(self, ticket: int) -> None:
        self._check_not_prepared()
        self._core.open(ticket)
        self._reduction.enter_micro_batch()
        if self._layers is not None:
            self._layers.arm()

    def _close(self, weight: MicroBatchWeight) -> None:
        self._reduction.collect(self._core)
        self._leave()
        self._core.close(weight.number, weight.tensor)

    def _abandon(self, ticket: int) -> None:
        """Takes the micro-batch with this ticket back; may be called again, at any time."""
        if self._core.is_open_with(ticket):
            self._leave()
            self._core.abort_with(ticket)

    def _leave(self) -> None:
        if self._layers is not None:
            self._layers.disarm()
        self._reduction.leave_micro_batch()

    def step(self, scaler: Any = None) -> Tensor:
        """Normalises, clips, steps the optimizer, and starts a new window.

        Nothing waits for the device. A gradient that is not finite skips the step, its counters
        included, and starts a new window all the same. So does an exception that comes after the
        optimizer has begun (Ctrl-C); one that comes before leaves the window as it was.

        Args:
            scaler: the ``torch.amp.GradScaler`` that scaled the losses. Its ``update()`` is still
                the caller's.

        Returns:
            The global norm of the normalised gradient, before clipping.

        Raises:
            RuntimeError: before any micro-batch, inside one, without any gradient.
        """
        self.prepare_step(scaler)
        assert self._prepared is not None
        norm, coefficient, found_inf = self._prepared
        if _is_on(scaler):
            _record(scaler, self._optimizer, found_inf)
        # Ctrl-C: the window is whole before the update begins, and empty after it has begun.
        run_then_clean_up(lambda: self._step(coefficient, found_inf), self.reset)
        return norm

    def prepare_step(self, scaler: Any = None) -> Tensor:
        """The norm that the following ``step()`` will return, for those who want it before.

        Between the two there may be no other micro-batch.
        """
        if self._prepared is None:
            self._core.check_steppable(self._reduction.is_alone)
            self._prepared = self._reduction.prepare_step(
                self._core, self._inverse_scale(scaler), self._max_norm
            )
        return self._prepared[0]

    def _inverse_scale(self, scaler: Any) -> Tensor | None:
        """What the gradient is multiplied by, beside the inverse of the window's weight."""
        return _inverse_scale(scaler)

    def reset(self) -> None:
        """Drops what the window holds, and a micro-batch that is open."""
        if self._core.is_open():
            self._leave()
        self._core.reset()
        self._prepared = None

    def state_dict(self) -> dict[str, Tensor]:
        """The window, half full or empty, and the master weights: a flat dict of tensors.

        Together with the model's and the optimizer's own it resumes bit by bit. Sums that are held
        are copied when the accumulator next writes them.
        """
        return dict(self._core.state())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave for the same model, in any order with its own.

        Raises:
            TypeError, RuntimeError: naming the entry that is wrong; the window stays as it was.
        """
        self._core.load_state(check_state(state_dict))
        self._prepared = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled together with the model and the optimizer, its window included."""
        if self._core.is_open():
            raise RuntimeError(f"{NAME}: copied or pickled inside a micro_batch(): end it first")
        options = {
            "dtype": self._dtype,
            "max_norm": self._max_norm,
            "fuse_linear": self._fuse_linear,
        }
        window = self.state_dict()
        return _rebuilt, (type(self), self._model, self._optimizer, options, window)


def _rebuilt(
    kind: type[GradientAccumulator],
    model: nn.Module,
    optimizer: Optimizer,
    options: dict[str, Any],
    window: dict[str, Tensor],
) -> GradientAccumulator:
    if "_parameters" not in vars(model):
        raise RuntimeError(
            f"{NAME}: an accumulator that its own model holds cannot be copied or pickled with it: "
            "the copy of the model is not whole when the accumulator's is made. Keep it outside of "
            "the model"
        )
    accumulator = kind(model, optimizer, **options)
    accumulator.load_state_dict(window)
    return accumulator


def _is_on(scaler: Any) -> bool:
    return scaler is not None and scaler.is_enabled()


def _inverse_scale(scaler: Any) -> Tensor | None:
    if not _is_on(scaler):
        return None
    if scaler._scale is None:
        raise RuntimeError(
            f"{NAME}: step(): scaler takes one that has scaled the losses: call "
            "scaler.scale(loss).backward() inside micro_batch()"
        )
    return scaler._scale.double().reciprocal()


def _record(scaler: Any, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Tells the scaler's update() what its own step() would have."""
    from torch.amp.grad_scaler import OptState

    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError(f"{NAME}: step(): call scaler.update() after each step")
    state["found_inf_per_device"] = {found_inf.device: found_inf}
    state["stage"] = OptState.STEPPED
