"""NumPy's numbers are numbers wherever Python's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import GradientAccumulator

_FLOATS = [np.float16, np.float32, np.float64]
_INTEGERS = [np.int8, np.uint16, np.int32, np.int64]


def _training(**options: Any) -> GradientAccumulator:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def _window(weight: Any, max_norm: Any) -> list[Tensor]:
    accumulator = _training(max_norm=max_norm)
    for rows in (1, 2):
        with accumulator.micro_batch(weight=weight):
            accumulator.model(torch.ones(rows, 3)).sum().backward()
    with accumulator.micro_batch() as micro_batch:
        accumulator.model(torch.ones(1, 3)).sum().backward()
        micro_batch.weight = weight
    accumulator.max_norm = max_norm
    accumulator.step()
    return list(accumulator.model.parameters())


@pytest.mark.parametrize("kind", _FLOATS + _INTEGERS)
def test_weights_and_norms(kind: Callable[[int], Any]) -> None:
    for actual, expected in zip(_window(kind(2), kind(1)), _window(2, 1), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", _INTEGERS)
def test_workers_and_weights_of_parallel_micro_batches(kind: Callable[[int], Any]) -> None:
    losses = []
    for number in (kind, int):
        accumulator = _training()
        losses.append(
            torch_ext.parallel_micro_batches(
                accumulator,
                lambda model, rows: (model(rows).square().sum(), number(3)),  # noqa: B023
                [torch.ones(2, 3), torch.ones(1, 3)],
                workers=number(2),
            )
        )
    assert torch.equal(*losses)


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array(1.0), np.complex64(1), "1"])
def test_what_is_no_number(value: Any) -> None:
    accumulator = _training()
    with pytest.raises(TypeError, match="max_norm takes a number"):
        accumulator.max_norm = value
    with pytest.raises(TypeError, match="weight takes a number"):
        accumulator.micro_batch(weight=value)
    with pytest.raises(TypeError, match="workers takes a whole number"):
        torch_ext.parallel_micro_batches(accumulator, lambda model, _: (model, 1), [], value)


@pytest.mark.parametrize("value", [np.float64(-1), np.int64(-1), np.float32("nan")])
def test_ranges(value: Any) -> None:
    accumulator = _training()
    with pytest.raises(ValueError, match="max_norm takes a number > 0"):
        accumulator.max_norm = value
    with pytest.raises(ValueError, match="weight takes a finite number >= 0"):
        accumulator.micro_batch(weight=value)


@pytest.mark.parametrize("kind", _FLOATS)
@pytest.mark.parametrize(
    "attention",
    [
        torch_ext.scaled_dot_product_attention,
        lambda *args, **kwargs: torch_ext.attention_forward(*args, **kwargs)[0],
    ],
    ids=["scaled_dot_product_attention", "attention_forward"],
)
def test_attention(attention: Callable[..., Tensor], kind: Callable[[float], Any]) -> None:
    query = torch.randn(1, 2, 5, 8)
    results = []
    for number in (kind, float):
        torch.manual_seed(0)
        results.append(attention(query, query, query, dropout_p=number(0.5), scale=number(0.25)))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", _INTEGERS)
def test_integers_of_attention(kind: Callable[[int], Any]) -> None:
    rows, weight = torch.randn(2, 3, 8), torch.randn(24, 8)
    heads = [
        torch_ext.self_attention(rows, weight, None, torch.eye(8), None, number(2))
        for number in (kind, int)
    ]
    assert torch.equal(*heads)
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    offsets = [
        torch_ext.attention_forward(query, key, key, is_causal=True, causal_offset=number(3))[0]
        for number in (kind, int)
    ]
    assert torch.equal(*offsets)


@pytest.mark.parametrize("kind", _FLOATS)
def test_operators_on_lists(kind: Callable[[float], Any]) -> None:
    ops = torch.ops.torch_ext
    results = []
    for number in (kind, float):
        sums, params = [torch.ones(3)], [torch.ones(3)]
        ops.grad_accumulate_(sums, [torch.ones(3)], beta=number(0.5))
        ops.sgd_step_(params, sums, [], [], lr=number(0.25), weight_decay=number(0.5))
        weight = torch.ones(3, 2)
        ops.linear_wgrad_(weight, None, torch.ones(4, 3), torch.ones(4, 2), beta=number(0.5))
        results.append([*sums, *params, weight])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
