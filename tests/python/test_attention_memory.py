"""Operands without memory are refused, and the causal offset has no end that overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext

OPS = torch.ops.torch_ext
INT64 = torch.iinfo(torch.int64)


def forward_operands() -> dict[str, Tensor]:
    return {
        "query": torch.randn(2, 3, 5, 8),
        "key": torch.randn(2, 3, 7, 8),
        "value": torch.randn(2, 3, 7, 8),
        "attn_mask": torch.randn(5, 7),
        "key_padding_mask": torch.zeros(2, 7, dtype=torch.bool),
        "dropout_seed": torch.tensor([3]),
    }


def backward_operands() -> dict[str, Tensor]:
    forward = forward_operands()
    out, logsumexp = OPS.attention_forward(**forward, dropout_p=0.1)
    return {
        "grad_out": torch.randn_like(out),
        "grad_logsumexp": torch.randn_like(logsumexp),
        **forward,
        "out": out,
        "logsumexp": logsumexp,
    }


def packed_operands() -> dict[str, Tensor]:
    return {
        "qkv": torch.randn(2, 5, 24),
        "attn_mask": torch.ones(5, 5, dtype=torch.bool),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool),
        "dropout_seed": torch.tensor([3]),
    }


def packed_backward_operands() -> dict[str, Tensor]:
    forward = packed_operands()
    out, logsumexp = OPS.packed_attention_forward(**forward, num_heads=2, dropout_p=0.1)
    return {
        "grad_out": torch.randn_like(out),
        "grad_logsumexp": torch.randn_like(logsumexp),
        **forward,
        "out": out,
        "logsumexp": logsumexp,
    }


def layer_operands() -> dict[str, Tensor]:
    return {
        "input": torch.randn(2, 5, 8),
        "in_proj_weight": torch.randn(24, 8),
        "in_proj_bias": torch.randn(24),
        "out_proj_weight": torch.randn(8, 8),
        "out_proj_bias": torch.randn(8),
        "attn_mask": torch.ones(5, 5, dtype=torch.bool),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool),
    }


CASES = [
    (OPS.attention_forward, forward_operands, {"dropout_p": 0.1}),
    (OPS.attention_backward, backward_operands, {"dropout_p": 0.1}),
    (OPS.packed_attention_forward, packed_operands, {"num_heads": 2, "dropout_p": 0.1}),
    (OPS.packed_attention_backward, packed_backward_operands, {"num_heads": 2, "dropout_p": 0.1}),
    (OPS.self_attention, layer_operands, {"num_heads": 2}),
    (
        OPS.scaled_dot_product_attention,
        lambda: dict(list(forward_operands().items())[:4]),
        {},
    ),
    (
        OPS.attention_dropout_mask,
        lambda: {"dropout_seed": torch.tensor([3])},
        {"dropout_p": 0.1, "sizes": [2, 3, 5, 7]},
    ),
]


@pytest.mark.parametrize("bytes_left", [0, 1])
@pytest.mark.parametrize(
    ("op", "operands", "name", "options"),
    [
        pytest.param(op, operands, name, options, id=f"{op._qualified_op_name}-{name}")
        for op, operands, options in CASES
        for name in operands()
    ],
)
def test_freed_storage(op: Any, operands: Any, name: str, options: Any, bytes_left: int) -> None:
    tensors = operands()
    tensors[name].untyped_storage().resize_(bytes_left)
    with pytest.raises(RuntimeError, match=rf"torch_ext::\w+: {name} takes a tensor with memory"):
        op(**tensors, **options)


def test_freed_storage_while_autograd_records() -> None:
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    freed = torch.randn(2, 3, 5, 8)
    freed.untyped_storage().resize_(0)
    for arguments in ((query, freed, query), (query, query, freed)):
        with pytest.raises(RuntimeError, match="takes a tensor with memory"):
            torch_ext.scaled_dot_product_attention(*arguments)
    with torch_ext.enabled(), pytest.raises(RuntimeError, match="takes a tensor with memory"):
        torch.nn.functional.scaled_dot_product_attention(query, freed, freed)


def test_a_storage_that_comes_back_is_read() -> None:
    """As sharded training does: freed between uses, allocated and filled before the next."""
    key = torch.randn(2, 3, 7, 8)
    query = torch.randn(2, 3, 5, 8)
    expected = torch_ext.scaled_dot_product_attention(query, key, key)
    filled = key.clone()
    key.untyped_storage().resize_(0)
    key.untyped_storage().resize_(filled.untyped_storage().nbytes())
    key.copy_(filled)
    assert torch.equal(torch_ext.scaled_dot_product_attention(query, key, key), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda t, q: OPS.grad_accumulate_([t], [q]),
        lambda t, q: OPS.grad_accumulate_([q], [t]),
        lambda t, q: OPS.grad_stats([q, t]),
        lambda t, q: OPS.linear_wgrad_(torch.randn(8, 8), None, t, q),
        lambda t, q: OPS.linear_wgrad_(torch.randn(8, 8), None, q, t),
        lambda t, q: OPS.embedding_wgrad_(torch.randn(9, 8), torch.zeros(5, dtype=torch.long), t),
    ],
    ids=["accumulators", "grads", "stats", "grad_output", "input", "embedding"],
)
def test_freed_storage_of_gradient_operators(call: Any) -> None:
    freed = torch.randn(5, 8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"torch_ext::\w+: [\w\[\]]+ takes a tensor with memory"):
        call(freed, torch.randn(5, 8))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("q_len", [1, 5, 70])
@pytest.mark.parametrize("offset", [INT64.min, INT64.min + 1, -71, 71, INT64.max - 1, INT64.max])
def test_causal_offset_of_any_size(offset: int, q_len: int, requires_grad: bool) -> None:
    """Below, no query sees a key; above, every query sees all."""
    query = torch.randn(1, 2, q_len, 8, requires_grad=requires_grad)
    key = torch.randn(1, 2, 70, 8, requires_grad=requires_grad)
    out, logsumexp = torch_ext.attention_forward(
        query, key, key, is_causal=True, causal_offset=offset
    )
    if offset > 0:
        expected, expected_logsumexp = torch_ext.attention_forward(query, key, key)
    else:
        expected = (query * 0).expand_as(out)
        expected_logsumexp = torch.full_like(logsumexp, -torch.inf)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)
    if requires_grad:
        grads, expected_grads = (
            torch.autograd.grad(o.sum(), (query, key), allow_unused=True, materialize_grads=True)
            for o in (out, expected)
        )
        torch.testing.assert_close(grads, expected_grads)
