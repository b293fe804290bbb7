"""Documents packed into one row through transformers: they never see one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor

from torch_ext.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

_LENGTHS = (3, 5, 1, 9)
_IDS = torch.arange(1, 1 + sum(_LENGTHS))[None]
_POSITIONS = torch.cat([torch.arange(n) for n in _LENGTHS])[None]
_ENDS = torch.tensor([0, 3, 8, 9, 18], dtype=torch.int32)
_KEYWORDS = {
    "cu_seq_lens_q": _ENDS,
    "cu_seq_lens_k": _ENDS,
    "max_length_q": 9,
    "max_length_k": 9,
}
_ONES = torch.ones(1, sum(_LENGTHS), dtype=torch.long)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    integration.register()


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="torch_ext")


def _one_by_one(model: Any) -> Tensor:
    parts = _IDS.split(list(_LENGTHS), 1)
    return torch.cat([model(input_ids=part).logits for part in parts], 1)


@pytest.mark.parametrize(
    "inputs",
    [
        {"position_ids": _POSITIONS, "use_cache": False},
        {"position_ids": _POSITIONS},
        {"position_ids": _POSITIONS, "attention_mask": _ONES},
        {"position_ids": _POSITIONS, **_KEYWORDS},
        {"position_ids": _POSITIONS, "use_cache": False, "attention_mask": _ONES, **_KEYWORDS},
    ],
    ids=["positions", "cache", "ones", "ends", "ends_ones"],
)
def test_documents_are_alone(inputs: dict[str, Any]) -> None:
    model = _model()
    expected = _one_by_one(model)
    actual = model(input_ids=_IDS, **inputs).logits
    assert_same_but_for_rounding(actual, expected, amplified=4.0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(actual.square().mean(), parameters)
    expected_grads = torch.autograd.grad(expected.square().mean(), parameters)
    assert names
    assert_same_but_for_rounding(grads, expected_grads, amplified=16.0)


def test_one_document_is_a_dense_call() -> None:
    model = _model()
    positions = torch.arange(sum(_LENGTHS))[None]
    assert torch.equal(
        model(input_ids=_IDS, position_ids=positions).logits, model(input_ids=_IDS).logits
    )
