"""alibi_slopes: -slope * |i + offset - j| is added to the scores."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES
from option_checks import call_tensors, check_options, check_second_order

import torch_ext

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 2, 70])
@pytest.mark.parametrize("is_causal", [False, True])
def test_slopes(is_causal: bool, q_len: int, dtype: torch.dtype) -> None:
    tensors = call_tensors((2, 4, q_len, 24), (2, 2, 130, 24), dtype)
    check_options(
        *tensors,
        alibi_slopes=SLOPES,
        enable_gqa=True,
        is_causal=is_causal,
        causal_lower_right=is_causal,
    )


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 4), (3, 1), (2, 3, 4), (2, 1, 4)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    tensors = call_tensors((2, 3, 4, 20, 8), (2, 3, 4, 30, 8))
    check_options(*tensors, alibi_slopes=torch.rand(shape))


def test_strides() -> None:
    tensors = call_tensors((3, 4, 20, 8), (3, 4, 30, 8))
    check_options(*tensors, alibi_slopes=torch.rand(4, 6)[:, ::2].t())


def test_twice() -> None:
    tensors = call_tensors((2, 4, 5, 4), (2, 4, 7, 4), torch.float64)
    check_second_order(*tensors, alibi_slopes=torch.rand(2, 4), causal_lower_right=True)


@pytest.mark.parametrize(
    ("slopes", "message"),
    [
        (torch.rand(4, dtype=torch.float64), "alibi_slopes takes Float, got Double"),
        (torch.rand(3), r"alibi_slopes takes \(heads\) or \(batch..., heads\)"),
        (torch.rand(3, 4), r"alibi_slopes takes \(heads\) or \(batch..., heads\)"),
        (torch.tensor(0.5), r"alibi_slopes takes \(heads\) or \(batch..., heads\)"),
        (torch.rand(4).to_sparse(), "alibi_slopes takes a dense tensor"),
        (torch.rand(4, device="meta"), "alibi_slopes takes the device of query"),
        (torch.rand(4, requires_grad=True), "alibi_slopes takes a tensor that does not require"),
    ],
)
def test_refusals(slopes: torch.Tensor, message: str) -> None:
    tensors = call_tensors((2, 4, 4, 4), (2, 4, 4, 4))
    with pytest.raises(RuntimeError, match=message):
        torch_ext.scaled_dot_product_attention(*tensors, alibi_slopes=slopes)
