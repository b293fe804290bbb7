"""transformers.Trainer with GradientAccumulationMixin: the same training, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from trainer_cases import AccumulatingTrainer, assert_same, logged, small_model, train


@pytest.mark.parametrize(
    "large_batch",
    [{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}],
    ids=["one large batch", "stock accumulation"],
)
def test_trains_as_stock_does(tmp_path: Path, large_batch: dict[str, Any]) -> None:
    ours = train(AccumulatingTrainer, tmp_path / "ours")
    stock = train(transformers.Trainer, tmp_path / "stock", **large_batch)
    assert_same(ours, stock)
    assert len(logged(ours, "loss")) == 3
    # Nothing is left on the trainer's objects.
    assert ours.accumulator is None
    assert "clip_grad_norm_" not in vars(ours.accelerator)
    assert vars(ours.optimizer).keys() == vars(stock.optimizer).keys()
    assert "Mixin" not in ours.optimizer.step.__qualname__


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.0},
        {"optim": "sgd", "learning_rate": 0.3},
        {"optim": "adafactor"},  # not one of those that run fused
        {"gradient_checkpointing": True},
        {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 5},
        {"label_smoothing_factor": 0.1},
    ],
    ids=["no clipping", "sgd", "adafactor", "checkpointing", "a short last window", "smoothing"],
)
def test_options(tmp_path: Path, options: dict[str, Any]) -> None:
    ours = train(AccumulatingTrainer, tmp_path / "ours", **options)
    stock = train(transformers.Trainer, tmp_path / "stock", **options)
    assert_same(ours, stock)


def test_the_layers_run_fused(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(AccumulatingTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            seen.append(self.accumulator is not None and self.accumulator.micro_batches > 0)
            seen.append(all(parameter.grad is None for parameter in model.parameters()))
            return loss

    train(Watching, tmp_path)
    assert len(seen) == 24
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_from_a_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
    whole = train(AccumulatingTrainer, tmp_path / "whole", small_model(dtype), **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "torch_ext_accumulator.pt").is_file()
    resumed = train(
        AccumulatingTrainer,
        tmp_path / "resumed",
        small_model(dtype),
        resume=str(checkpoint),
        **options,
    )
    for actual, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_trainer_may_train_twice(tmp_path: Path) -> None:
    ours = train(AccumulatingTrainer, tmp_path / "ours")
    stock = train(transformers.Trainer, tmp_path / "stock")
    ours.train()
    stock.train()
    assert_same(ours, stock)
