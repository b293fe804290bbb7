"""How the options of a score (window, soft cap, ALiBi, sink, the lower right diagonal) are checked.

The formula of attention_reference in float64 is the truth. The same formula, step by step in the
call's own dtype, stands for stock torch, which has none of these options: nothing may lie further
from the truth than STOCK_FACTOR times as far as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attention_reference import attention
from rounding_bounds import assert_no_further
from torch import Tensor

NAMES = ("query", "key", "value", "attn_mask", "sink")


def call_tensors(
    query: Sequence[int],
    key: Sequence[int],
    dtype: torch.dtype = torch.float32,
    value: Sequence[int] | None = None,
) -> list[Tensor]:
    """query, key and value, which require grad."""
    return [
        torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in (query, key, value or key)
    ]


def _twins(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    twins: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        if tensor is None or not tensor.is_floating_point():
            twins[name] = tensor
        else:
            twins[name] = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
    return twins


def _results(
    out: Tensor, logsumexp: Tensor, leaves: dict[str, Tensor | None], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs, and gradients of both of them."""
    wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    finite = logsumexp.isfinite()
    loss = (out * weights[0].to(out.dtype)).sum()
    loss = loss + (logsumexp.masked_fill(~finite, 0.0) * weights[1].to(logsumexp.dtype)).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()))
    found = {"out": out, "logsumexp": logsumexp.masked_fill(~finite, 0.0)}
    found |= {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def check_options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> None:
    """out, logsumexp and every gradient of attention_forward against the formula."""
    tensors = dict(zip(NAMES, (query, key, value, attn_mask, sink), strict=True))
    dtype = query.dtype

    def by_formula(precision: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        twins = _twins(tensors, precision)
        out, logsumexp = attention(
            *(twins[name] for name in NAMES[:4]),
            sink=twins["sink"],
            dropout_p=dropout_p,
            keep=keep,
            dtype=precision,
            **options,
        )
        return out, logsumexp, twins

    out, logsumexp = torch.ops.torch_ext.attention_forward(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        sink=sink,
        dropout_seed=dropout_seed,
        **options,
    )
    keep = None
    if dropout_p > 0:
        sizes = [*logsumexp.shape, key.size(-2)]
        keep = torch.ops.torch_ext.attention_dropout_mask(dropout_seed, dropout_p, sizes)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in (out, logsumexp)]
    actual = _results(out, logsumexp, tensors, weights)
    exact_out, exact_logsumexp, twins = by_formula(torch.float64)
    assert torch.equal(logsumexp.isfinite(), exact_logsumexp.isfinite())
    exact = _results(exact_out, exact_logsumexp, twins, weights)
    stock = _results(*by_formula(dtype), weights)
    # Types and shapes are the formula's in the call's dtype, but of logsumexp and of what keeps a
    # precision of its own.
    stock = {name: tensor.to(actual[name].dtype) for name, tensor in stock.items()}
    assert_no_further(actual, stock, exact)


def check_second_order(*inputs: Tensor | None, **options: Any) -> None:
    """gradgradcheck of query, key, value[, attn_mask[, sink]] in float64, and gradcheck."""
    given = [t for t in inputs if t is not None]
    places = [i for i, t in enumerate(inputs) if t is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Tensor | None] = [None] * 5
        for place, tensor in zip(places, tensors, strict=True):
            full[place] = tensor
        out, logsumexp = torch.ops.torch_ext.attention_forward(*full[:4], sink=full[4], **options)
        return out, logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
