"""Large scores that hardly differ: what they are rounded by decides the weights.

In every row, so that no single row's luck decides the norm that is compared with stock's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import HALF_DTYPES, AttentionCase, AttentionTensors, formula, fused, stock
from rounding_bounds import assert_no_further

CASES = [
    AttentionCase((2, 4, 64, 64), (2, 4, 64, 64)),
    AttentionCase((1, 4, 70, 128), (1, 4, 300, 128), is_causal=True),
    # At most four rows: the decoding kernel, and the backward pass that makes the same scores.
    AttentionCase((64, 8, 1, 64), (64, 8, 20, 64)),
    AttentionCase((32, 8, 3, 16), (32, 8, 90, 16)),
    AttentionCase((32, 16, 1, 64), (32, 4, 40, 64), enable_gqa=True),
    AttentionCase((32, 4, 2, 64), (32, 4, 300, 64), is_causal=True, causal_offset=298),
]


def tie_neighbours(tensors: AttentionTensors, magnitude: float) -> None:
    """Scores of some magnitude**2; those of keys 2n and 2n + 1 differ by about 1."""
    tensors.query *= magnitude
    tensors.key *= magnitude
    half = tensors.key.shape[-1] // 2
    tensors.query[..., half:] /= magnitude**2
    even = tensors.key[..., ::2, :half]
    tensors.key[..., 1::2, :half] = even[..., : tensors.key.shape[-2] // 2, :]


def share_a_direction(tensors: AttentionTensors, magnitude: float) -> None:
    """Scores of some magnitude that differ by about 1, and gradients in which the rest cancels."""
    tensors.key += magnitude * torch.randn(tensors.key.shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("prepare", [tie_neighbours, share_a_direction])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_near_ties_are_stocks(
    case: AttentionCase,
    prepare: Callable[[AttentionTensors, float], None],
    dtype: torch.dtype,
) -> None:
    for magnitude in (3.0, 10.0, 30.0, 100.0, 1000.0):
        tensors = case.tensors(dtype)
        with torch.no_grad():
            prepare(tensors, magnitude)
        grad_out = torch.randn(*case.query[:-1], case.value_shape[-1]).to(dtype)
        results = [which(case, tensors, grad_out) for which in (fused, stock, formula)]
        assert_no_further(*(result.named() for result in results))
