"""Packed sequences that do not fit: an error that names the argument, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from varlen_cases import cumulative

import torch_ext


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "query": torch.randn(10, 4, 8),
        "key": torch.randn(12, 2, 8),
        "value": torch.randn(12, 2, 8),
        "cu_seq_q": cumulative([4, 6]),
        "cu_seq_k": cumulative([5, 7]),
        "max_q": 6,
        "max_k": 7,
        "enable_gqa": True,
    }
    arguments.update(changes)
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seq_q": torch.tensor([1, 4, 10])}, "cu_seq_q takes 0 as its first element, got 1"),
        ({"cu_seq_q": torch.tensor([0, 11, 10])}, "max_q takes the length of the longest sequence"),
        ({"cu_seq_k": torch.tensor([0, 6, 5])}, "cu_seq_k takes elements that never decrease"),
        ({"cu_seq_q": torch.tensor([0, 5, 11])}, "cu_seq_q takes at most the rows of query, 10"),
        ({"cu_seq_q": torch.tensor([0])}, "cu_seq_k takes as many elements as cu_seq_q, 1, got 3"),
        ({"cu_seq_q": torch.tensor([0.0, 4, 10])}, "cu_seq_q takes a dense Int or Long tensor"),
        ({"cu_seq_q": torch.tensor([], dtype=torch.int32)}, "cu_seq_q takes one element more"),
        ({"cu_seq_k": None}, "cu_seq_k takes a tensor where there is no block_table, got None"),
        ({"max_q": 5}, "max_q takes the length of the longest sequence or more, got 5"),
        ({"max_k": 6}, "max_k takes the length of the longest sequence or more, got 6"),
        ({"seqused_k": torch.tensor([5, 8])}, "seqused_k takes 0 up to the number of keys"),
        ({"seqused_k": torch.tensor([5])}, "seqused_k takes an element for each sequence, 2"),
        ({"query": torch.randn(10, 32)}, "query takes 3 dimensions"),
        ({"query": torch.randn(10, 4, 9)}, "key takes the head_dim of query, 9, got 8"),
        ({"query": torch.randn(10, 3, 8)}, "a number of heads that divides query's, 3, got 2"),
        ({"enable_gqa": False}, "key and value take as many heads as query, 4, got 2"),
        ({"key": torch.randn(12, 2, 8).double()}, "key takes the dtype of query, Float"),
        ({"value": torch.randn(11, 2, 8)}, "value takes the rows and heads of key"),
        ({"window_size": (-2, 0)}, "window_size takes two numbers from -1"),
        ({"softcap": -1.0}, "softcap takes a number from 0"),
        ({"softcap": float("nan")}, "softcap takes a number from 0"),
        ({"scale": float("nan")}, "scale takes a number, got NaN"),
        ({"dropout_p": 1.5}, "dropout_p takes a probability"),
        ({"sink": torch.zeros(3)}, r"sink takes the shape \(heads\), \(4\), got \[3\]"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes takes the shape \(heads\) or"),
        ({"alibi_slopes": torch.zeros(4).double()}, "alibi_slopes takes a dense Float tensor"),
        (
            {"k_scale": torch.ones(())},
            "k_scale and v_scale take None where there is no block_table",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch_ext.varlen_attn(**_arguments(**changes))


def test_refused_by_the_python_function() -> None:
    with pytest.raises(ValueError, match="window_size takes two numbers"):
        torch_ext.varlen_attn(**_arguments(window_size=(1, 2, 3)))
    with pytest.raises(ValueError, match="num_splits takes None or a number from 0 on, got -1"):
        torch_ext.varlen_attn(**_arguments(num_splits=-1))


def test_a_refused_call_draws_no_seed() -> None:
    arguments = _arguments(dropout_p=0.5, softcap=-1.0)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        torch_ext.varlen_attn(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_freed_memory_is_an_error() -> None:
    arguments = _arguments()
    arguments["key"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="key takes a tensor with memory"):
        torch_ext.varlen_attn(**arguments)
