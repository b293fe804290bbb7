"""Mini-batch training: micro-batches of any sizes, summed into one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_ext.accumulating_layers import AccumulatingLayers
from torch_ext.gradient_reduction import Reduction, reduction_of, unwrapped
from torch_ext.optimizer_steps import OptimizerStep, keep_float32_moments, local_tensor

__all__ = ["GradientAccumulator", "MicroBatch"]

_NAME = "torch_ext.GradientAccumulator"

# c10::ScalarType
_DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def _check_max_norm(max_norm: float | None) -> float | None:
    if max_norm is None:
        return None
    if not isinstance(max_norm, (int, float)) or isinstance(max_norm, bool):
        raise TypeError(f"{_NAME}: max_norm takes a number > 0 or None, got {max_norm!r}")
    if not max_norm > 0.0:
        raise ValueError(f"{_NAME}: max_norm takes a number > 0 or None, got {max_norm}")
    return float(max_norm)


def _check_dtype(dtype: torch.dtype) -> int:
    if dtype not in _DTYPE_CODES:
        raise ValueError(
            f"{_NAME}: dtype takes torch.float32, float64, bfloat16 or float16, got {dtype}"
        )
    return _DTYPE_CODES[dtype]


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that have or may get gradients."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model takes an nn.Module, got {type(model).__name__}")
    found: dict[str, nn.Parameter] = {}
    for name, param in unwrapped(model).named_parameters():
        if isinstance(param, nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"{_NAME}: model takes initialised parameters, {name} is not: run a forward first"
            )
        if param.device.type == "meta":
            raise ValueError(f"{_NAME}: model takes parameters with memory, {name} is on meta")
        if param.dtype in _DTYPE_CODES or param.requires_grad:
            found[name] = param
    if not found:
        raise ValueError(f"{_NAME}: model takes a module with parameters, got one without")
    return found


def _check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{_NAME}: optimizer takes a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    missing = [
        name for name, param in parameters.items() if param.requires_grad and id(param) not in held
    ]
    if missing:
        raise ValueError(
            f"{_NAME}: optimizer takes one that holds the model's parameters, got one without "
            f"{missing[0]}{_and_more(missing)}"
        )
    known = {id(param) for param in parameters.values()}
    foreign = [
        f"one of sizes {tuple(param.shape)}"
        for group in optimizer.param_groups
        for param in group["params"]
        if id(param) not in known
    ]
    if foreign:
        raise ValueError(
            f"{_NAME}: optimizer takes one that holds the model's parameters only, got others: "
            f"{foreign[0]}{_and_more(foreign)}"
        )


def _and_more(items: list[str]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


class _Weight:
    """A checked micro-batch weight: a number, or a tensor on a device that is not waited for."""

    __slots__ = ("number", "tensor")

    def __init__(self, weight: float | Tensor, device: torch.device) -> None:
        self.number = 0.0
        self.tensor: Tensor | None = None
        if isinstance(weight, Tensor):
            if weight.numel() != 1 or weight.is_complex():
                raise ValueError(
                    f"{_NAME}: weight takes a number >= 0 or a real tensor of one element, got "
                    f"{weight.dtype} of sizes {tuple(weight.shape)}"
                )
            if weight.device.type != "cpu":
                self.tensor = weight.detach().reshape(()).to(device, torch.float64, copy=True)
                return
            weight = weight.item()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(
                f"{_NAME}: weight takes a number >= 0 or a tensor of one element, got "
                f"{type(weight).__name__}"
            )
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{_NAME}: weight takes a finite number >= 0, got {weight}")
        self.number = float(weight)


class MicroBatch:
    """The context of one micro-batch, from :meth:`GradientAccumulator.micro_batch`.

    Attributes:
        weight: may be set until the context ends, for a weight that the forward pass finds out.
    """

    __slots__ = ("_accumulator", "weight")

    def __init__(self, accumulator: GradientAccumulator, weight: float | Tensor) -> None:
        self._accumulator = accumulator
        self.weight = weight

    def __enter__(self) -> MicroBatch:
        self._accumulator._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._accumulator._close(self.weight, failed=kind is not None)


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
            inside their backward, without writing the gradients first.

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
        code = _check_dtype(dtype)
        self._max_norm = _check_max_norm(max_norm)
        parameters = _named_parameters(model)
        _check_optimizer(optimizer, parameters)
        self._model = model
        self._optimizer = optimizer
        self._dtype_code = code
        self._names = list(parameters)
        self._params: list[Tensor] = list(parameters.values())
        self._reduction: Reduction = reduction_of(model, self._params)
        self._core = self.new_core()
        self._device = local_tensor(self._params[0]).device
        self._step = OptimizerStep(optimizer, self._core, self._params, self._names)
        keep_float32_moments(optimizer)
        self._core.ignore_node_hooks(self._reduction.leaves_node_hooks)
        self._layers: AccumulatingLayers | None = None
        if fuse_linear and self._reduction.takes_grads:
            index_of = {id(param): index for index, param in enumerate(self._params)}
            layers = AccumulatingLayers(model, self._core, index_of, self._device)
            self._layers = layers if len(layers) else None

    def new_core(self) -> Any:
        """Another window for the same parameters, empty: parallel micro-batches are summed there."""
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
        self._max_norm = _check_max_norm(max_norm)

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

        Hooks and ``torch.autograd.grad`` work inside as ever; ``.grad`` holds this micro-batch's
        gradients while it lasts, and afterwards what it held before. A micro-batch that ends with
        an exception leaves no trace, unless its backward had begun to add to the sums of earlier
        ones: then ``reset()`` has to be called.
        """
        return MicroBatch(self, weight)

    def _open(self) -> None:
        self._core.open()
        try:
            self._reduction.enter_micro_batch()
            if self._layers is not None:
                self._layers.arm()
        except BaseException:
            self._close(0.0, failed=True)
            raise

    def _close(self, weight: float | Tensor, failed: bool) -> None:
        if self._layers is not None:
            self._layers.disarm()
        self._reduction.leave_micro_batch()
        if failed:
            self._core.abort()
            return
        try:
            checked = _Weight(weight, self._device)
            self._reduction.collect(self._core, self._params)
        except BaseException:
            self._core.abort()
            raise
        self._core.close(checked.number, checked.tensor)

    def step(self, scaler: Any = None) -> Tensor:
        """Normalises, clips, steps the optimizer, and starts a new window.

        Nothing waits for the device. A gradient that is not finite skips the step, its counters
        included, and starts a new window all the same.

        Args:
            scaler: the ``torch.amp.GradScaler`` that scaled the losses. Its ``update()`` is still
                the caller's.

        Returns:
            The global norm of the normalised gradient, before clipping.

        Raises:
            RuntimeError: before any micro-batch, inside one, without any gradient.
        """
        self._core.check_steppable()
        inverse_scale = _inverse_scale(scaler)
        norm, coefficient, found_inf = self._reduction.prepare_step(
            self._core, inverse_scale, self._max_norm
        )
        if inverse_scale is not None:
            _record(scaler, self._optimizer, found_inf)
        try:
            self._step(coefficient, found_inf)
        finally:
            self._core.reset()
        return norm

    def reset(self) -> None:
        """Drops what the window holds."""
        self._core.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """The window, half full or empty, and the master weights: a flat dict of tensors.

        Together with the model's and the optimizer's own it resumes bit by bit. Sums that are held
        are copied when the accumulator next writes them.
        """
        return dict(self._core.state())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave for the same model, in any order with its own."""
        self._core.load_state(dict(state_dict))


def _inverse_scale(scaler: Any) -> Tensor | None:
    if scaler is None or not scaler.is_enabled():
        return None
    if scaler._scale is None:
        raise RuntimeError(
            f"{_NAME}: step(): scaler takes one that has scaled the losses: call "
            "scaler.scale(loss).backward() inside micro_batch()"
        )
    return scaler._scale.double().reciprocal()


def _record(scaler: Any, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Tells the scaler's update() what its own step() would have."""
    from torch.amp.grad_scaler import OptState

    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.STEPPED:
        raise RuntimeError(f"{_NAME}: step(): call scaler.update() after each step")
    state["found_inf_per_device"] = {found_inf.device: found_inf}
    state["stage"] = OptState.STEPPED
