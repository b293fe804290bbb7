"""Mini-batch training: micro-batches of any sizes, summed into one optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_ext._C import run_then_clean_up
from torch_ext.accumulating_layers import AccumulatingLayers
from torch_ext.accumulator_arguments import (
    NAME,
    MicroBatchWeight,
    check_dtype,
    check_independent_micro_batches,
    check_models,
    check_optimizers,
    check_state,
    named_parameters,
)
from torch_ext.float32_moments import keep_float32_moments, local_tensor
from torch_ext.forgotten_calls import ForgottenCalls
from torch_ext.grad_scaling import inverse_scale, is_on, record_step
from torch_ext.gradient_clipping import GradientClipping
from torch_ext.gradient_reduction import Reduction, reduction_of
from torch_ext.micro_batch import MicroBatch
from torch_ext.optimizer_steps import OptimizerSteps
from torch_ext.visible_gradients import VisibleGradients

__all__ = ["GradientAccumulator", "MicroBatch"]


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
            torch.compile'd ones too. Several of them, where one step trains all (a model and a
            loss with parameters of its own).
        optimizer: holds the model's parameters, and no others. Several of them may share the
            parameters (Muon for matrices, AdamW for the rest). Prepared ones of accelerate's too.
        dtype: of the sums. float64 parameters are summed in float64 at least.
        max_norm: clips the gradient's global norm; None: not clipped.
        norm_type: of the norm, as in ``torch.nn.utils.clip_grad_norm_``.
        clip_value: clips every element of the gradient, as ``clip_grad_value_`` does, after its
            norm; None: not clipped.
        error_if_nonfinite: a gradient that is not finite raises an error, as in
            ``clip_grad_norm_``, and drops the window, instead of skipping the step.
        add_in_backward: ``nn.Linear`` and ``nn.Embedding`` add their weights' gradients to the
            sums inside their backward, without writing the gradients first, and other large
            gradients are added as soon as they are complete. With False ``.grad`` holds all of a
            micro-batch's gradients until it ends, to look at or to change.
        fuse_linear: the former name of ``add_in_backward``; deprecated.

    bf16 and fp16 parameters train as the rounding of float32 masters, with float32 moments,
    whatever the optimizer. Parameters that somebody writes take their masters along.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, what it takes and what it got.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        dtype: torch.dtype = torch.float32,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        error_if_nonfinite: bool = False,
        add_in_backward: bool = True,
        fuse_linear: bool | None = None,
    ) -> None:
        code = check_dtype(dtype)
        self._clipping = GradientClipping(max_norm, norm_type, clip_value, error_if_nonfinite)
        if fuse_linear is not None:
            warnings.warn(
                f"{NAME}: fuse_linear is called add_in_backward now",
                DeprecationWarning,
                stacklevel=2,
            )
            add_in_backward = fuse_linear
        models = check_models(model)
        parameters = named_parameters(models)
        self._wrappers, optimizers = check_optimizers(optimizer, parameters)
        self._model = models[0] if isinstance(model, nn.Module) else nn.ModuleList(models)
        self._optimizer = optimizer if isinstance(optimizer, Optimizer) else self._wrappers
        self._optimizers = optimizers
        self._dtype = dtype
        self._dtype_code = code
        self._names = list(parameters)
        self._params: list[Tensor] = list(parameters.values())
        self._reduction: Reduction = reduction_of(models, self._params, self._names)
        self._core = self.new_core()
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None
        self._shown: VisibleGradients | None = None
        self._found_inf: Tensor | None = None
        self._forgotten_calls = ForgottenCalls(self, optimizers)
        self._step = OptimizerSteps(optimizers, self._core, self._params, self._names)
        for one in optimizers:
            keep_float32_moments(one)
        self._core.ignore_node_hooks(self._reduction.leaves_node_hooks)
        self._adds_in_backward = add_in_backward
        self._layers: AccumulatingLayers | None = None
        if add_in_backward and self._reduction.takes_grads:
            index_of = {id(param): index for index, param in enumerate(self._params)}
            self._layers = AccumulatingLayers(models, self._core, index_of)

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
        """The module as it was given; several of them as an ``nn.ModuleList``."""
        return self._model

    @property
    def optimizer(self) -> Optimizer | list[Optimizer]:
        """The optimizer, or the list of them, as it was given."""
        return self._optimizer

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return local_tensor(self._params[0]).device

    @property
    def max_norm(self) -> float | None:
        """The norm that the gradient is clipped to; may be set between steps."""
        return self._clipping.max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float | None) -> None:
        self._clipping.max_norm = max_norm

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

    def micro_batch(self, weight: float | Tensor = 1.0, *, separate: bool = False) -> MicroBatch:
        """The context in which one micro-batch's ``backward()`` is called, on the summed loss.

        Args:
            weight: what the summed loss is to be divided by in the end: its number of tokens or
                examples, >= 0. The step divides by the sum of all micro-batches' weights. With mean
                losses of micro-batches of one size leave it at 1.
            separate: nothing is added before the context ends, as without ``add_in_backward``, so
                that the micro-batch can be discarded, or may fail, after its ``backward()``.

        Hooks and ``torch.autograd.grad`` work inside as ever. What ``.grad`` held before it holds
        again afterwards. A micro-batch that ends with an exception leaves no trace, unless its
        backward had begun to add to the sums of earlier ones: then ``reset()`` has to be called.
        Ctrl-C is such an exception, wherever it comes.
        """
        return MicroBatch(self, weight, separate)

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

    def _check_discardable(self, ticket: int) -> None:
        if not self._core.is_open_with(ticket):
            raise RuntimeError(f"{NAME}: discard() takes an open micro_batch(), this one has ended")
        if not self._core.can_abort():
            raise RuntimeError(
                f"{NAME}: discard(): this micro-batch's backward() has been added to the sums of "
                "earlier ones: call discard() before it, or open the micro-batch with "
                "micro_batch(weight, separate=True)"
            )

    # A micro-batch is the core's between the first line of _open() and the last of _close() or of
    # _abandon(): wherever Ctrl-C comes in between, _abandon() finds something to take back.

    def _open(self, ticket: int, separate: bool) -> None:
        self._check_not_prepared()
        self._core.add_in_backward(self._adds_in_backward and not separate)
        self._core.open(ticket)
        self._forgotten_calls.begin()
        self._reduction.enter_micro_batch()
        if self._layers is not None and not separate:
            self._layers.arm(self.device)

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
        if self._shown is not None:
            self._shown.take_back()
            if self._reduction.takes_grads:
                found_inf = self._core.measure()[1]
        if is_on(scaler):
            for optimizer in self._optimizers:
                record_step(scaler, optimizer, found_inf)
        self._found_inf = found_inf
        # Ctrl-C: the window is whole before the update begins, and empty after it has begun.
        run_then_clean_up(lambda: self._update(coefficient, found_inf), self.reset)
        if found_inf.device.type == "cpu" or is_on(scaler):
            for wrapper in self._wrappers:
                if hasattr(wrapper, "_is_overflow"):  # accelerate's, which its schedulers ask
                    wrapper._is_overflow = self.step_was_skipped
        return norm

    def _update(self, coefficient: Tensor, found_inf: Tensor) -> None:
        self._forgotten_calls.is_expected = True  # an optimizer's step, if it is not fused
        if self._shown is None:
            coefficient = self._clipping.clip_values(self._core, coefficient)
        self._step(coefficient, found_inf)

    def prepare_step(self, scaler: Any = None) -> Tensor:
        """The norm that the following ``step()`` will return, for those who want it before.

        Between the two there may be no other micro-batch.
        """
        if self._prepared is None:
            self._core.check_steppable(self._reduction.is_alone)
            self._prepared = self._clipping.prepare(
                self._core, self._reduction, self._inverse_scale(scaler)
            )
            try:
                self._clipping.check_finite(self._prepared[0])
            except RuntimeError:
                self.reset()
                raise
        return self._prepared[0]

    def fill_grad(self, scaler: Any = None) -> Tensor:
        """Puts the gradient that ``step()`` will step with into the parameters' ``.grad``.

        Normalised and clipped, to look at or to change: the step takes it from there. ``.grad``
        keeps it afterwards, as in torch. Returns what :meth:`prepare_step` returns.
        """
        norm = self.prepare_step(scaler)
        self._show()
        return norm

    def _show(self) -> None:
        if self._shown is not None or self._prepared is None:
            return
        norm, coefficient, found_inf = self._prepared
        try:
            self._shown = VisibleGradients(self._core, self._params)
            self._shown.show(self._clipping.clip_values(self._core, coefficient))
            self._prepared = (norm, torch.ones_like(coefficient), found_inf)
            self._forgotten_calls.is_expected = True
        except BaseException:
            self.reset()
            raise

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last ``step()`` found a gradient that is not finite, and left the optimizers
        and their counters alone. Asks the device where the parameters are."""
        return self._found_inf is not None and bool(self._found_inf.item())

    def _inverse_scale(self, scaler: Any) -> Tensor | None:
        """What the gradient is multiplied by, beside the inverse of the window's weight."""
        return inverse_scale(scaler)

    def reset(self) -> None:
        """Drops what the window holds, and a micro-batch that is open."""
        if self._core.is_open():
            self._leave()
        self._core.reset()
        self._prepared = None
        self._shown = None
        self._forgotten_calls.end()

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
        options = {"dtype": self._dtype, "add_in_backward": self._adds_in_backward}
        options |= self._clipping.options()
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
