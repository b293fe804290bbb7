"""How far a result may lie from another one that differs only in rounding.

Processors, vector widths and thread counts round differently, and torch's own results with them: an
absolute bound tells how one machine rounds. Two rules instead, both in norm, tensor by tensor:

- `assert_no_further`: a result that stock torch has too lies no further from float64 than stock's,
  times STOCK_FACTOR. A model's amplification (normalisation, cancellation) is in stock's own error.
- `assert_same_but_for_rounding`: two ways to one result of operators on numbers of size 1 differ by
  no more than some roundings of the dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attention_reference import relative_error
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# Correct results differ in the order of their sums: one chain of n products errs by up to sqrt(w)
# times as much as w vector lanes, w = 16 at most. Over all tests and instruction sets 1.8 was seen.
STOCK_FACTOR = 4.0
# Stock may round nothing at all where another correct result does (a single key, a weight of 1).
STOCK_ROUNDINGS = 4.0
# Zero but for rounding, as the gradient of a key's bias is, or of a query with one key: measured as
# if its entries were this part of the largest tensor's, among a model's or an operator's results.
MODEL_ZERO_SHARE = 0.01
OPERATOR_ZERO_SHARE = 0.1
# A gradient of attention passes four products and an exponential; each errs by about
# sqrt(terms) / 2 eps in norm, terms being some dozens in the tests. 7 eps were seen.
ROUNDINGS = 32.0
# 16-bit types are computed in float32 and rounded where they are written: each tensor on the way,
# by a third of an eps in norm.
HALF_ROUNDINGS = 4.0


def no_further_than(stock_error: float, size: float, dtype: torch.dtype) -> float:
    """The error allowed where stock errs by stock_error on numbers of that size."""
    # In float64 the reference is rounded as both are, and no nearer the truth.
    roundings = ROUNDINGS if dtype is torch.float64 else STOCK_ROUNDINGS
    return STOCK_FACTOR * stock_error + roundings * torch.finfo(dtype).eps * size


def same_but_for_rounding(dtype: torch.dtype) -> float:
    """The relative difference in norm allowed between two results, dtype the coarsest in them."""
    return (HALF_ROUNDINGS if dtype.itemsize < 4 else ROUNDINGS) * torch.finfo(dtype).eps


def assert_no_further(
    ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """By name: error against exact (float64) at most STOCK_FACTOR times stock's, and some eps.

    ours has to match stock in names, dtypes and shapes.
    """
    assert ours.keys() == stock.keys() == exact.keys()
    least = MODEL_ZERO_SHARE * max((_root_mean_square(t) for t in exact.values()), default=0.0)
    for name, expected in stock.items():
        actual, reference = ours[name].detach(), exact[name].detach().double()
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        size = max(_root_mean_square(reference), least)
        stock_error = _root_mean_square(expected.detach().double() - reference)
        error = _root_mean_square(actual.double() - reference)
        bound = no_further_than(stock_error, size, expected.dtype)
        assert error <= bound, f"{name}: error {error:.3g}, stock's {stock_error:.3g} of {size:.3g}"


def _root_mean_square(tensor: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor.detach().double()))
    return norm / max(tensor.numel(), 1) ** 0.5


def assert_same_but_for_rounding(
    actual: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    dtype: torch.dtype | None = None,
    amplified: float = 1.0,
) -> None:
    """Tensors or sequences of them.

    Args:
        dtype: the coarsest on the way to actual; None: actual's.
        amplified: by how much what follows the operators enlarges their roundings.
    """
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        actual, expected = [actual], [expected]
    least = OPERATOR_ZERO_SHARE * max((_root_mean_square(t) for t in expected), default=0.0)
    for index, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        assert mine.shape == other.shape, f"{index}: {mine.shape} and {other.shape}"
        difference = relative_error(mine, other, least * other.numel() ** 0.5)
        bound = amplified * same_but_for_rounding(dtype or mine.dtype)
        assert difference <= bound, f"{index}: they differ by {difference:.3g}, bound {bound:.3g}"


class _Float64(TorchFunctionMode):
    """Every torch function gets its floating arguments, and every dtype asked for, in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.double()
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return torch.float64
            return value

        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Code inside computes in float64, whatever the dtypes of its parameters and inputs.

    For forward passes: the float32 tensors from outside are read, not written. A backward outside
    brings every leaf its gradient in float64, rounded to the leaf's dtype once for each use of it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)
