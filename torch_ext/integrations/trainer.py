"""Hugging Face's Trainer with torch_ext.GradientAccumulator under its loop.

    from torch_ext.integrations import transformers as torch_ext_hf

    class Trainer(torch_ext_hf.GradientAccumulationMixin, transformers.Trainer):
        pass

Nothing else changes: ``gradient_accumulation_steps``, ``max_grad_norm``, schedulers, checkpoints
and logging mean what they mean, and so does the loss, which the Trainer divides by the tokens of
the whole window itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_ext.float32_moments import keep_float32_moments
from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.integrations.trainer_window import TrainerWindow
from torch_ext.optimizer_steps import innermost_optimizer

__all__ = ["GradientAccumulationMixin"]

_STATE_FILE = "torch_ext_accumulator.pt"


class _Base:
    """What the mixin finds in transformers.Trainer."""

    if TYPE_CHECKING:
        args: Any
        optimizer: Any
        accelerator: Any
        callback_handler: Any

        def train(self, *args: Any, **kwargs: Any) -> Any: ...
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any: ...
        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any: ...
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...


class GradientAccumulationMixin(_Base):
    """Comes before ``transformers.Trainer``, or a subclass of it, among a class's bases.

    Micro-batches are summed in float32 and stepped in one pass, bf16 and fp16 models train with
    float32 master weights, and those survive in the Trainer's checkpoints. DistributedDataParallel
    communicates once a step. Not with DeepSpeed, which accumulates itself.

    Callbacks find the gradient in ``.grad`` where stock shows it, and may edit it: the sum so far
    in ``on_substep_end``, the normalised and clipped one from ``on_pre_optimizer_step`` to
    ``on_optimizer_step``. An exception inside a window drops what the window holds.
    """

    _accumulator: TrainerWindow | None = None
    _resumed_from: str | None = None
    add_in_backward = True
    """As in GradientAccumulator; a class attribute, to be set in a subclass."""
    fuse_linear: bool | None = None
    """The former name of ``add_in_backward``; deprecated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is put in the place of others' methods while training: owner, name, ours, theirs.
        self._attached: list[tuple[Any, str, Any, Any]] = []
        super().__init__(*args, **kwargs)

    @property
    def accumulator(self) -> GradientAccumulator | None:
        """The accumulator at work; None before the first step of ``train()``."""
        return self._accumulator

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        # Before a checkpoint is loaded.
        keep_float32_moments(innermost_optimizer(self.optimizer))
        return optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        accumulator = self._accumulator_for(model)
        steps = getattr(self, "current_gradient_accumulation_steps", None)
        try:
            with accumulator.micro_batch(1.0 / (steps or self.args.gradient_accumulation_steps)):
                return super().training_step(model, *args, **kwargs)
        except BaseException:
            # The window may be tried again, with smaller batches.
            accumulator.reset()
            raise

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # auto_find_batch_size comes here again after it has run out of memory.
        self._detach()
        self._resumed_from = None
        return super()._inner_training_loop(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()

    def _accumulator_for(self, model: nn.Module) -> TrainerWindow:
        optimizer = innermost_optimizer(self.optimizer)
        if self._accumulator is not None and self._accumulator.optimizer is optimizer:
            return self._accumulator
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                "torch_ext: GradientAccumulationMixin takes a Trainer without DeepSpeed, which "
                "accumulates gradients itself"
            )
        self._detach()
        window = TrainerWindow(
            model,
            optimizer,
            add_in_backward=self.add_in_backward,
            fuse_linear=self.fuse_linear,
        )
        if self._resumed_from is not None:
            window.load_state_dict(torch.load(self._resumed_from, weights_only=True))
            self._resumed_from = None
        self._accumulator = window
        # The Trainer's loop clips, then steps: both are the accumulator's, and the gradients that
        # it would clip and step with are not in .grad.
        self._attach(self.accelerator, "clip_grad_norm_", self._clip)
        self._attach(self.callback_handler, "on_pre_optimizer_step", self._wrapped_callbacks())
        self._attach(self.callback_handler, "on_substep_end", self._wrapped_substep())
        self._attach(self.optimizer, "step", self._wrapped_step())
        return window

    def _attach(self, owner: Any, name: str, method: Any) -> None:
        self._attached.append((owner, name, method, vars(owner).get(name)))
        setattr(owner, name, method)

    def _detach(self) -> None:
        self._accumulator = None
        while self._attached:
            owner, name, method, before = self._attached.pop()
            if vars(owner).get(name) is not method:
                continue
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _clip(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        window = self._accumulator
        assert window is not None
        clipped = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if window.is_between_micro_batches:
            return nn.utils.clip_grad_norm_(clipped, max_norm, norm_type)
        if not window.is_prepared and norm_type == 2 and window.is_whole(clipped):
            window.max_norm = max_norm if 0.0 < max_norm < math.inf else None
            return window.prepare_step(self._scaler())
        norm = window.prepare_unclipped(self._scaler())
        if max_norm == math.inf and norm_type == 2 and not window.is_shown:
            return norm
        # Once more, or in a way of its own: what there is to clip lies in .grad from here on.
        window.show_gradients()
        return nn.utils.clip_grad_norm_(clipped, max_norm, norm_type)

    def _wrapped_callbacks(self) -> Any:
        callbacks = self.callback_handler.on_pre_optimizer_step

        def on_pre_optimizer_step(*args: Any, **kwargs: Any) -> Any:
            window = self._accumulator
            if window is not None and self._has_callback(
                "on_pre_optimizer_step", "on_optimizer_step"
            ):
                window.prepare_unclipped(self._scaler())
                window.show_gradients()
            return callbacks(*args, **kwargs)

        return on_pre_optimizer_step

    def _wrapped_substep(self) -> Any:
        callbacks = self.callback_handler.on_substep_end

        def on_substep_end(*args: Any, **kwargs: Any) -> Any:
            window = self._accumulator
            if window is None or not self._has_callback("on_substep_end"):
                return callbacks(*args, **kwargs)
            return window.with_sums_so_far(lambda: callbacks(*args, **kwargs))

        return on_substep_end

    def _has_callback(self, *events: str) -> bool:
        """Whether a callback has something to do in one of these, where stock fills ``.grad``."""
        from transformers import TrainerCallback

        return any(
            getattr(getattr(callback, event, None), "__func__", None)
            is not getattr(TrainerCallback, event)
            for callback in self.callback_handler.callbacks
            for event in events
        )

    def _wrapped_step(self) -> Any:
        def step(closure: Any = None) -> None:
            self.optimizer._opt_called = True
            self._step()

        # Schedulers look for their own mark to see whether the optimizer is stepped at all.
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    def _step(self) -> None:
        assert self._accumulator is not None
        scaler = self._scaler()
        norm = self._accumulator.step(scaler)
        if scaler is not None:
            scaler.update()
            # What accelerate tells the scheduler by.
            self.optimizer._is_overflow = not bool(norm.isfinite())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._accumulator is not None and self.args.should_save:
            torch.save(self._accumulator.state_dict(), os.path.join(output_dir, _STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = os.path.join(checkpoint, _STATE_FILE)
            self._resumed_from = path if os.path.isfile(path) else None
