"""A tiny causal model, its data, and a run of transformers.Trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn

from torch_ext.integrations import transformers as torch_ext_hf

_VOCABULARY = 40
_SEQ = 10


class AccumulatingTrainer(torch_ext_hf.GradientAccumulationMixin, transformers.Trainer):
    pass


def small_model(dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
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


def examples(count: int = 24) -> list[dict[str, Tensor]]:
    """Sequences of which different numbers of tokens count."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        tokens = torch.randint(_VOCABULARY, (_SEQ,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + index * 5 % 8] = -100
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def train(
    kind: type[transformers.Trainer],
    folder: Path,
    model: nn.Module | None = None,
    resume: str | None = None,
    rows: Any = None,
    callbacks: Any = (),
    trainer: dict[str, Any] | None = None,
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
    made = kind(
        model=small_model() if model is None else model,
        args=arguments,
        train_dataset=examples() if rows is None else rows,
        callbacks=list(callbacks),
        **(trainer or {}),
    )
    made.train(resume_from_checkpoint=resume)
    return made


def logged(trainer: transformers.Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# AdamW divides a gradient by its own size: an entry near zero is all rounding, and three steps of a
# learning rate of 1e-2 bring it into the rest. A third of the bound without the factor was seen.
TRAINING_AMPLIFIES = 8.0


def assert_same(ours: transformers.Trainer, stock: transformers.Trainer) -> None:
    for name in ("loss", "grad_norm"):
        values = (torch.tensor(logged(trainer, name)) for trainer in (ours, stock))
        assert_same_but_for_rounding(*values, amplified=TRAINING_AMPLIFIES)
    assert logged(ours, "learning_rate") == logged(stock, "learning_rate")
    parameters = (list(trainer.model.parameters()) for trainer in (ours, stock))
    assert_same_but_for_rounding(*parameters, amplified=TRAINING_AMPLIFIES)
