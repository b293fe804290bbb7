"""GradientAccumulationMixin: the Trainer's own rules about windows, clipping and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from trainer_cases import (
    TRAINING_AMPLIFIES,
    AccumulatingTrainer,
    assert_same,
    examples,
    logged,
    small_model,
    train,
)

Callback = transformers.TrainerCallback
_SGD = {"optim": "sgd", "learning_rate": 0.3}


def _both(folder: Path, *, callbacks: Callable[[], Any] | None = None, **options: Any) -> Any:
    trainers = []
    for kind in (AccumulatingTrainer, transformers.Trainer):
        made = [] if callbacks is None else [callbacks()]
        trainers.append(train(kind, folder / kind.__name__, callbacks=made, **options))
    return trainers


class _Clipping(Callback):  # type: ignore[misc]
    def __init__(self, norms: list[float]) -> None:
        self._norms = norms

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.max_grad_norm = self._norms[state.global_step]


@pytest.mark.parametrize("norms", [[0.5, 0.05, 0.0, 1e9], [0.0, 0.01, 0.0, 0.02]])
def test_a_callback_changes_max_grad_norm(tmp_path: Path, norms: list[float]) -> None:
    assert_same(*_both(tmp_path, callbacks=lambda: _Clipping(norms), max_steps=4, **_SGD))


class _Accumulating(Callback):  # type: ignore[misc]
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.gradient_accumulation_steps = 4 if state.epoch < 1 else 2


def test_a_callback_changes_the_accumulation_steps(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2}
    assert_same(*_both(tmp_path, callbacks=_Accumulating, **options, **_SGD))


class _Reading(Callback):  # type: ignore[misc]
    def __init__(self, seen: list[list[Tensor | None]], event: str) -> None:
        self._seen = seen
        setattr(self, event, self._read)

    def _read(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        grads = [param.grad for param in model.parameters()]
        self._seen.append([None if grad is None else grad.clone() for grad in grads])


@pytest.mark.parametrize(
    ("event", "optimizer", "times"),
    [
        ("on_pre_optimizer_step", "adafactor", 3),
        ("on_optimizer_step", "adamw_torch", 3),
        ("on_substep_end", "adamw_torch", 9),
    ],
)
def test_callbacks_read_grad(tmp_path: Path, event: str, optimizer: str, times: int) -> None:
    seen: list[list[list[Tensor | None]]] = []

    def reading() -> Callback:
        seen.append([])
        return _Reading(seen[-1], event)

    trainers = _both(tmp_path, callbacks=reading, optim=optimizer)
    assert_same(*trainers)
    assert len(seen[0]) == times
    for ours, stock in zip(*seen, strict=True):
        assert_same_but_for_rounding(ours, stock, amplified=TRAINING_AMPLIFIES)
    assert all(param.grad is None for param in trainers[0].model.parameters())


class _Editing(Callback):  # type: ignore[misc]
    def __init__(
        self, edit: Callable[[nn.Parameter], None], event: str = "on_pre_optimizer_step"
    ) -> None:
        self._edit_one = edit
        setattr(self, event, self._edit)

    def _edit(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for param in model.parameters():
            self._edit_one(param)


def _zero_half(param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad[: param.shape[0] // 2] = 0


def _past_the_version_counter(param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad.data.mul_(0.5)


def _replace(param: nn.Parameter) -> None:
    param.grad = torch.full_like(param, 1e-3)


def _drop_vectors(param: nn.Parameter) -> None:
    if param.dim() == 1:
        param.grad = None


@pytest.mark.parametrize(
    ("edit", "optimizer"),
    [
        (_zero_half, "sgd"),
        (_zero_half, "adafactor"),
        (_past_the_version_counter, "sgd"),
        (_replace, "adafactor"),
        (_drop_vectors, "sgd"),
    ],
)
@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_substep_end"])
def test_callbacks_edit_grad(
    tmp_path: Path, edit: Callable[[nn.Parameter], None], optimizer: str, event: str
) -> None:
    options = {"optim": optimizer, "learning_rate": 0.1}
    assert_same(*_both(tmp_path, callbacks=lambda: _Editing(edit, event), **options))


def test_callbacks_edit_grad_of_a_bf16_model(tmp_path: Path) -> None:
    trainers = [
        train(
            AccumulatingTrainer,
            tmp_path / name,
            small_model(torch.bfloat16),
            callbacks=callbacks,
            **_SGD,
        )
        for name, callbacks in (
            ("edited", [_Editing(_zero_half)]),
            ("read", [_Reading([], "on_pre_optimizer_step"), _Reading([], "on_substep_end")]),
            ("alone", []),
        )
    ]
    start = small_model(torch.bfloat16)
    for (name, edited), read, alone, before in zip(
        trainers[0].model.named_parameters(),
        trainers[1].model.parameters(),
        trainers[2].model.parameters(),
        start.parameters(),
        strict=True,
    ):
        half = edited.shape[0] // 2
        assert torch.equal(edited[:half], before[:half]), name
        # Those who only read leave the float32 sums as they are, bit by bit.
        assert torch.equal(read, alone), name


class _ClippingByItself(Callback):  # type: ignore[misc]
    def __init__(self, event: str) -> None:
        self.norms: list[float] = []
        setattr(self, event, self._clip)

    def _clip(self, *_: Any, model: nn.Module, **__: Any) -> None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=torch.inf)
        self.norms.append(float(norm))


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_substep_end"])
def test_a_callback_clips_once_more(tmp_path: Path, event: str) -> None:
    made: list[_ClippingByItself] = []

    def clipping() -> Callback:
        made.append(_ClippingByItself(event))
        return made[-1]

    assert_same(*_both(tmp_path, callbacks=clipping, **_SGD))
    assert made[0].norms == pytest.approx(made[1].norms, rel=1e-3)


def test_a_trainer_that_clips_in_its_own_way(tmp_path: Path) -> None:
    class Clipping:
        def _clip_grad_norm(self, model: nn.Module) -> Tensor:
            self.accelerator.clip_grad_norm_(list(model.parameters())[:2], 0.05)  # type: ignore[attr-defined]
            return self.accelerator.clip_grad_norm_(model.parameters(), 0.1, norm_type=1)  # type: ignore[attr-defined]

    class Ours(Clipping, AccumulatingTrainer):
        pass

    class Stock(Clipping, transformers.Trainer):
        pass

    assert_same(train(Ours, tmp_path / "ours", **_SGD), train(Stock, tmp_path / "stock", **_SGD))


class _Failing:
    """Runs out of memory in the second micro-batch of a window, after its backward."""

    fails_at = 1

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls - 1 == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return loss


class _FailingInside(_Failing, transformers.Trainer):  # type: ignore[misc]
    pass


class _OursFailingInside(AccumulatingTrainer, _FailingInside):
    pass


class _OursFailingOutside(_Failing, AccumulatingTrainer):
    pass


@pytest.mark.parametrize(
    ("ours", "fails_at"),
    [(_OursFailingInside, 1), (_OursFailingOutside, 0), (_OursFailingOutside, 5)],
)
def test_auto_find_batch_size_starts_anew(tmp_path: Path, ours: Any, fails_at: int) -> None:
    trainers = []
    for kind in (ours, _FailingInside):
        made = type(kind.__name__, (kind,), {"fails_at": fails_at})
        trainers.append(
            train(
                made,
                tmp_path / kind.__name__,
                per_device_train_batch_size=4,
                auto_find_batch_size=True,
                **_SGD,
            )
        )
    assert_same(*trainers)


class _Swallowing:
    """Goes on after a micro-batch has failed before its backward."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 1:
            raise ValueError("a bad batch")
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        except ValueError:
            return torch.zeros(())


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exception_that_somebody_swallows(tmp_path: Path, steps: int) -> None:
    class Ours(_Swallowing, AccumulatingTrainer):
        pass

    class Stock(_Swallowing, transformers.Trainer):  # type: ignore[misc]
        pass

    trainers = [
        train(kind, tmp_path / kind.__name__, gradient_accumulation_steps=steps, **_SGD)
        for kind in (Ours, Stock)
    ]
    assert_same(*trainers)


class _Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(examples(22))


def test_an_epoch_that_ends_inside_a_window(tmp_path: Path) -> None:
    """The Trainer keeps what it has, and the next epoch's first window comes on top."""
    options = {"max_steps": 7, "max_grad_norm": 0.0, **_SGD, "learning_rate": 0.05}
    trainers = _both(tmp_path, rows=_Endless(), **options)
    assert_same(*trainers)
    assert max(logged(trainers[0], "grad_norm")) > 1.5 * min(logged(trainers[0], "grad_norm"))


class _StoppingEpochs(Callback):  # type: ignore[misc]
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_epoch_stop = state.global_step == 1
        return control


def test_an_epoch_that_a_callback_stops_inside_a_window(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 3}
    assert_same(*_both(tmp_path, callbacks=_StoppingEpochs, **options, **_SGD))


def _summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class _PlainLosses(nn.Module):
    """No loss keywords: the Trainer divides each micro-batch's mean loss itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    "case",
    [
        {"trainer": {"compute_loss_func": _summed_loss}},
        {"plain": True},
        {"label_smoothing_factor": 0.2},
        {"trainer": {"eval_dataset": examples(4)}, "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["own loss", "plain loss", "smoothing", "evaluation"],
)
def test_losses_over_epochs_with_leftovers(tmp_path: Path, case: dict[str, Any]) -> None:
    case = dict(case)
    plain = case.pop("plain", False)
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 5}
    trainers = [
        train(
            kind,
            tmp_path / kind.__name__,
            _PlainLosses() if plain else None,
            **options,
            **_SGD,
            **case,
        )
        for kind in (AccumulatingTrainer, transformers.Trainer)
    ]
    assert_same(*trainers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_inside_an_epoch_with_leftovers(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = train(AccumulatingTrainer, tmp_path / "whole", small_model(dtype), **options)
    for step in (2, 3):
        resumed = train(
            AccumulatingTrainer,
            tmp_path / f"resumed {step}",
            small_model(dtype),
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
            **options,
        )
        for actual, expected in zip(
            resumed.model.parameters(), whole.model.parameters(), strict=True
        ):
            assert torch.equal(actual, expected)


def test_a_resume_that_fails_is_forgotten(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    train(AccumulatingTrainer, tmp_path / "whole", **options)
    state = tmp_path / "whole" / "checkpoint-2" / "torch_ext_accumulator.pt"
    torch.save({"weight": torch.ones(2)}, state)
    trainer = AccumulatingTrainer(
        model=small_model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1
        ),
        train_dataset=examples(),
    )
    with pytest.raises(RuntimeError, match="load_state_dict"):
        trainer.train(resume_from_checkpoint=str(state.parent))
    trainer.train()
    assert trainer.state.global_step == 1
