"""Formulas for torch.utils.flop_counter: what FlopCounterMode counts for torch_ext's operators.

Counted as torch counts its own fused attention: two products forward and five backward, which
computes the scores once more, of whole matrices, whatever masks leave out. Sums, norms and
optimizer steps have no products, and count 0 in torch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch

from torch_ext.import_hooks import WhenImported

__all__ = ["install"]

Shape = Sequence[int]


def _forward(rows: int, kv_len: int, head_dim: int, value_dim: int) -> int:
    """The products with key and with value. rows: queries of all batches and heads."""
    return 2 * rows * kv_len * (head_dim + value_dim)


def _backward(rows: int, kv_len: int, head_dim: int, value_dim: int) -> int:
    """Scores, their gradient, and the gradients of value, query and key."""
    return 2 * rows * kv_len * (3 * head_dim + 2 * value_dim)


def attention_forward(
    query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any, **__: Any
) -> int:
    """query: (..., q_len, head_dim), key: (..., kv_len, head_dim), value: (..., value_dim)."""
    return _forward(prod(out_shape[1]), key[-2], query[-1], value[-1])


def attention_backward(
    grad_out: Shape,
    grad_logsumexp: Shape | None,
    query: Shape,
    key: Shape,
    value: Shape,
    out: Shape,
    logsumexp: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """logsumexp: (batch..., heads, q_len)"""
    return _backward(prod(logsumexp), key[-2], query[-1], value[-1])


def packed_attention_forward(qkv: Shape, num_heads: int, *_: Any, out_shape: Any, **__: Any) -> int:
    """qkv: (batch, seq, 3 * embed)"""
    head_dim = qkv[-1] // 3 // num_heads
    return _forward(prod(out_shape[1]), qkv[-2], head_dim, head_dim)


def packed_attention_backward(
    grad_out: Shape,
    grad_logsumexp: Shape | None,
    qkv: Shape,
    num_heads: int,
    out: Shape,
    logsumexp: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """logsumexp: (batch, heads, seq)"""
    head_dim = qkv[-1] // 3 // num_heads
    return _backward(prod(logsumexp), qkv[-2], head_dim, head_dim)


def linear_wgrad(
    weight_grad: Shape, bias_grad: Shape | None, grad_output: Shape, *_: Any, **__: Any
) -> int:
    """weight_grad: (out_features, in_features), grad_output: (..., out_features)"""
    return 2 * prod(grad_output) * weight_grad[1]


def embedding_wgrad(*_: Any, **__: Any) -> int:
    """Rows are added; torch's embedding gradient counts 0 too."""
    return 0


def _register(flop_counter: ModuleType) -> None:
    ops = torch.ops.torch_ext
    for operator, formula in (
        (ops.attention_forward, attention_forward),
        (ops.attention_backward, attention_backward),
        (ops.packed_attention_forward, packed_attention_forward),
        (ops.packed_attention_backward, packed_attention_backward),
        (ops.linear_wgrad_, linear_wgrad),
        (ops.embedding_wgrad_, embedding_wgrad),
    ):
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)


# Importing it imports Triton, which takes longer than all of torch_ext.
_when_imported = WhenImported("torch.utils.flop_counter", "FlopCounterMode", _register)


def install() -> None:
    """Registers the formulas once torch.utils.flop_counter is imported."""
    _when_imported.wait()
