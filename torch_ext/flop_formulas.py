"""Formulas for torch.utils.flop_counter: what FlopCounterMode counts for torch_ext's operators.

Counted as torch counts its own fused attention: two products forward and five backward, which
computes the scores once more, of whole matrices, whatever masks leave out. A window counts the
pairs in it: that is the work there. Sums, norms and
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


def _pairs(q_len: int, kv_len: int, options: dict[str, Any]) -> int:
    """Pairs of a query and a key that are computed, of one head."""
    left, right = options.get("window_size", (-1, -1))
    if left < 0 and right < 0:
        return q_len * kv_len
    offset = options.get("causal_offset", 0)
    if options.get("causal_lower_right", False):
        offset += kv_len - q_len
    if options.get("is_causal", False):
        right = 0
    first = offset - left if left >= 0 else None
    end = offset + right + 1 if right >= 0 else None
    # Keys below `end`, less those below `first` of them: the window's edges do not cross.
    behind = q_len * kv_len if end is None else _below(end, q_len, kv_len)
    return behind - (0 if first is None else _below(first, q_len, kv_len))


def _below(first_end: int, q_len: int, kv_len: int) -> int:
    """Of queries i = 0, 1, ..., the keys j < first_end + i: the sum of min(max(.., 0), kv_len)."""
    begin = min(max(0, -first_end), q_len)  # the first query that sees a key
    full = min(max(begin, kv_len - first_end), q_len)  # the first that sees all
    rows = full - begin
    return rows * (first_end + begin) + rows * (rows - 1) // 2 + (q_len - full) * kv_len


def _forward(pairs: int, head_dim: int, value_dim: int) -> int:
    """The products with key and with value. pairs: of all batches and heads."""
    return 2 * pairs * (head_dim + value_dim)


def _backward(pairs: int, head_dim: int, value_dim: int) -> int:
    """Scores, their gradient, and the gradients of value, query and key."""
    return 2 * pairs * (3 * head_dim + 2 * value_dim)


def attention_forward(
    query: Shape,
    key: Shape,
    value: Shape,
    attn_mask: Shape | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    out_shape: Any,
    **options: Any,
) -> int:
    """query: (..., q_len, head_dim), key: (..., kv_len, head_dim), value: (..., value_dim)."""
    heads = prod(out_shape[1][:-1])
    pairs = heads * _pairs(query[-2], key[-2], {"is_causal": is_causal, **options})
    return _forward(pairs, query[-1], value[-1])


def attention_backward(
    grad_out: Shape,
    grad_logsumexp: Shape | None,
    query: Shape,
    key: Shape,
    value: Shape,
    out: Shape,
    logsumexp: Shape,
    attn_mask: Shape | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    **options: Any,
) -> int:
    """logsumexp: (batch..., heads, q_len)"""
    pairs = prod(logsumexp[:-1]) * _pairs(query[-2], key[-2], {"is_causal": is_causal, **options})
    return _backward(pairs, query[-1], value[-1])


def packed_attention_forward(
    qkv: Shape,
    num_heads: int,
    attn_mask: Shape | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    out_shape: Any,
    **options: Any,
) -> int:
    """qkv: (batch, seq, 3 * embed)"""
    head_dim = qkv[-1] // 3 // num_heads
    heads = prod(out_shape[1][:-1])
    pairs = heads * _pairs(qkv[-2], qkv[-2], {"is_causal": is_causal, **options})
    return _forward(pairs, head_dim, head_dim)


def packed_attention_backward(
    grad_out: Shape,
    grad_logsumexp: Shape | None,
    qkv: Shape,
    num_heads: int,
    out: Shape,
    logsumexp: Shape,
    attn_mask: Shape | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    **options: Any,
) -> int:
    """logsumexp: (batch, heads, seq)"""
    head_dim = qkv[-1] // 3 // num_heads
    pairs = prod(logsumexp[:-1]) * _pairs(qkv[-2], qkv[-2], {"is_causal": is_causal, **options})
    return _backward(pairs, head_dim, head_dim)


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
