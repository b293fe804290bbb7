"""Calls of the mini-batch operators that are to be refused, and what refusing means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accumulation_cases import OPS, nonzero
from torch import Tensor

Call = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def refuses(call: Call, message: str, error: type[Exception] = RuntimeError) -> None:
    op, args, kwargs = call
    watched = [
        t.detach()
        for t in _tensors((args, tuple(kwargs.values())))
        if t.layout is torch.strided and not t.is_meta and not t.is_quantized and not t.is_nested
    ]
    before = [t.clone() for t in watched]
    with pytest.raises(error, match=message):
        op(*args, **kwargs)
    for now, old in zip(watched, before, strict=True):
        same = torch.allclose(now, old, rtol=0, atol=0, equal_nan=True)
        assert same, "written before it was refused"


def accumulate(accumulators: Any, grads: Any, **options: Any) -> Call:
    return OPS.grad_accumulate_, (accumulators, grads), options


def wgrad(weight: Tensor, bias: Tensor | None, grad: Tensor, value: Tensor, **options: Any) -> Call:
    return OPS.linear_wgrad_, (weight, bias, grad, value), options


def embedding(weight: Tensor, indices: Tensor, grad: Tensor, **options: Any) -> Call:
    return OPS.embedding_wgrad_, (weight, indices, grad), options


def adamw(count: int = 2, **replaced: Any) -> Call:
    """A good call of two (3, 4) tensors, but for what is replaced."""
    names = ("params", "accumulators", "exp_avgs", "exp_avg_sqs")
    lists: dict[str, Any] = {n: [nonzero(3, 4).abs() for _ in range(count)] for n in names}
    lists |= {"max_exp_avg_sqs": [], "master_params": []}
    lists |= {"steps": [torch.tensor(1.0) for _ in range(count)]}
    options: dict[str, Any] = {"lr": 0.1}
    for name, value in replaced.items():
        (lists if name in lists else options)[name] = value
    op = OPS.adamw_step_.tensor_lr if isinstance(options["lr"], Tensor) else OPS.adamw_step_
    return op, tuple(lists.values()), options


def sgd(count: int = 2, **replaced: Any) -> Call:
    names = ("params", "accumulators", "momentum_buffers")
    lists: dict[str, Any] = {n: [nonzero(3, 4) for _ in range(count)] for n in names}
    lists["master_params"] = []
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    for name, value in replaced.items():
        (lists if name in lists else options)[name] = value
    op = OPS.sgd_step_.tensor_lr if isinstance(options["lr"], Tensor) else OPS.sgd_step_
    return op, tuple(lists.values()), options


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)
