"""transformers.Trainer with GradientAccumulationMixin: the same training, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor

from torch_ext.integrations import transformers as torch_ext_hf

_VOCABULARY = 40
_SEQ = 10


class AccumulatingTrainer(torch_ext_hf.GradientAccumulationMixin, transformers.Trainer):
    pass


def _model(dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def _examples(count: int = 24) -> list[dict[str, Tensor]]:
    """Sequences of which different numbers of tokens count."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        tokens = torch.randint(_VOCABULARY, (_SEQ,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + index * 5 % 8] = -100
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def _train(
    kind: type[transformers.Trainer],
    folder: Path,
    model: transformers.PreTrainedModel | None = None,
    resume: str | None = None,
    **options: Any,
) -> transformers.Trainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(defaults | options))
    trainer = kind(
        model=_model() if model is None else model, args=arguments, train_dataset=_examples()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _logged(trainer: transformers.Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _assert_same(ours: transformers.Trainer, stock: transformers.Trainer) -> None:
    for name in ("loss", "grad_norm"):
        logged = (torch.tensor(_logged(trainer, name)) for trainer in (ours, stock))
        assert_same_but_for_rounding(*logged)
    assert _logged(ours, "learning_rate") == _logged(stock, "learning_rate")
    parameters = (list(trainer.model.parameters()) for trainer in (ours, stock))
    assert_same_but_for_rounding(*parameters)


@pytest.mark.parametrize(
    "large_batch",
    [{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}],
    ids=["one large batch", "stock accumulation"],
)
def test_trains_as_stock_does(tmp_path: Path, large_batch: dict[str, Any]) -> None:
    ours = _train(AccumulatingTrainer, tmp_path / "ours")
    stock = _train(transformers.Trainer, tmp_path / "stock", **large_batch)
    _assert_same(ours, stock)
    assert len(_logged(ours, "loss")) == 3
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
    ours = _train(AccumulatingTrainer, tmp_path / "ours", **options)
    stock = _train(transformers.Trainer, tmp_path / "stock", **options)
    _assert_same(ours, stock)


def test_the_layers_run_fused(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(AccumulatingTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            seen.append(self.accumulator is not None and self.accumulator.micro_batches > 0)
            seen.append(all(parameter.grad is None for parameter in model.parameters()))
            return loss

    _train(Watching, tmp_path)
    assert len(seen) == 24
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_from_a_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
    whole = _train(AccumulatingTrainer, tmp_path / "whole", _model(dtype), **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "torch_ext_accumulator.pt").is_file()
    resumed = _train(
        AccumulatingTrainer, tmp_path / "resumed", _model(dtype), resume=str(checkpoint), **options
    )
    for actual, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_trainer_may_train_twice(tmp_path: Path) -> None:
    ours = _train(AccumulatingTrainer, tmp_path / "ours")
    stock = _train(transformers.Trainer, tmp_path / "stock")
    ours.train()
    stock.train()
    _assert_same(ours, stock)
