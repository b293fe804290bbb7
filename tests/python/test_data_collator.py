"""torch_ext.data.PackingCollator, and training on its rows: the same as document by document."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rounding_bounds import assert_same_but_for_rounding
from torch import nn
from torch.utils.data import DataLoader

from torch_ext import GradientAccumulator
from torch_ext.data import PackedBatchSampler, PackingCollator
from torch_ext.integrations import transformers as torch_ext_hf

_DOCUMENTS = [[5, 6, 7], [8], [], [9, 10]]


def _equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (batch[name].dtype, batch[name].tolist()) == (value.dtype, value.tolist()), name
        else:
            assert batch[name] == value, name


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_row_of_documents(make: Any) -> None:
    features = [{"input_ids": make(document)} for document in _DOCUMENTS]
    ends = torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32)
    _equal(
        PackingCollator()(features),
        {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]]),
            "labels": torch.tensor([[-100, 6, 7, -100, -100, 10]]),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": 3,
            "max_length_k": 3,
        },
    )
    for feature, document in zip(features, _DOCUMENTS, strict=True):
        assert list(feature["input_ids"]) == document  # nobody's tensors are written


def test_labels_masks_and_other_entries() -> None:
    features = [
        {"input_ids": [1, 2, 3], "labels": [-100, 20, 30], "attention_mask": [0, 1, 1]},
        {"input_ids": [4, 5], "labels": torch.tensor([40, 50]), "text": "left out"},
    ]
    batch = PackingCollator(label_ignore_index=-1)(features)
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-1, 30, -1, 50]]
    assert features[1]["labels"].tolist() == [40, 50]


def test_it_is_hugging_faces_row() -> None:
    features = [{"input_ids": document} for document in _DOCUMENTS if document]
    stock = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    ours = PackingCollator()(features)
    assert ours.keys() == dict(stock).keys()
    for name, value in stock.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


def test_an_empty_batch_is_an_empty_row() -> None:
    batch = PackingCollator()([])
    assert batch["input_ids"].shape == (1, 0)
    assert batch["cu_seq_lens_q"].tolist() == [0]
    assert batch["max_length_q"] == 0


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([[1, 2]], TypeError, "takes dictionaries with 'input_ids', got list at 0"),
        (
            [{"tokens": [1]}],
            TypeError,
            r"takes dictionaries with 'input_ids', got \['tokens'\] at 0",
        ),
        ([{"input_ids": [[1]]}], ValueError, r"input_ids takes one dimension, got sizes \(1, 1\)"),
        ([{"input_ids": [1.0]}], TypeError, "input_ids takes integers, got torch.float32 at 0"),
        (
            [{"input_ids": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            ValueError,
            "labels takes as many as input_ids, 2, got 1 at 1",
        ),
        ([{"input_ids": [1], "attention_mask": []}], ValueError, "attention_mask takes as many"),
    ],
)
def test_refusals_name_the_entry(features: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"torch_ext\.data\.PackingCollator: " + message):
        PackingCollator()(features)


def _model() -> transformers.PreTrainedModel:
    torch_ext_hf.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="torch_ext")


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_training_on_packed_rows_is_training_document_by_document() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 1, 4, 17, 6, 12, 2, 7]
    documents = [
        {"input_ids": torch.randint(40, (length,), generator=generator)} for length in lengths
    ]
    packed = _model()
    alone = copy.deepcopy(packed)
    loader = DataLoader(
        documents,  # type: ignore[arg-type]
        batch_sampler=PackedBatchSampler(lengths, 24),
        collate_fn=PackingCollator(),
    )
    assert len(loader) < len(lengths)
    accumulator = GradientAccumulator(packed, torch.optim.SGD(packed.parameters(), lr=0.5))
    for batch in loader:
        labels = batch.pop("labels")
        with accumulator.micro_batch(weight=(labels != -100).sum()):
            _summed_loss(packed(**batch, use_cache=False).logits, labels).backward()
    accumulator.step()
    total = sum(length - 1 for length in lengths)
    for document in documents:
        tokens = document["input_ids"].unsqueeze(0)
        (_summed_loss(alone(tokens, use_cache=False).logits, tokens) / total).backward()
    torch.optim.SGD(alone.parameters(), lr=0.5).step()
    assert_same_but_for_rounding(list(packed.parameters()), list(alone.parameters()))
