"""embedding_wgrad_: an embedding's weight gradient, accumulated in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accumulation_cases import (
    DTYPE_PAIRS,
    DTYPES,
    OPS,
    dtype_id,
    layouts,
    nonzero,
    read_layouts,
)
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor

pytestmark = pytest.mark.usefixtures("device")


def check(
    weight: Tensor,
    indices: Tensor,
    grad: Tensor,
    beta: float = 1.0,
    padding_idx: int = -1,
    by_frequency: bool = False,
) -> None:
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    rows, tokens = (
        indices.long().reshape(-1),
        grad.double().reshape(indices.numel(), weight.shape[1]),
    )
    keep = rows != padding_idx
    rows, tokens = rows[keep], tokens[keep]
    if by_frequency:
        tokens = tokens / torch.bincount(rows, minlength=len(weight))[rows].unsqueeze(1)
    expected.index_add_(0, rows, tokens)
    if beta != 0:
        expected += beta * weight.double()
    pointer = weight.data_ptr()
    result = OPS.embedding_wgrad_(
        weight, indices, grad, padding_idx=padding_idx, scale_grad_by_freq=by_frequency, beta=beta
    )
    assert result is None
    assert weight.data_ptr() == pointer
    eps = torch.finfo(
        torch.float64 if torch.float64 in (weight.dtype, grad.dtype) else torch.float32
    ).eps
    torch.testing.assert_close(
        weight.double(),
        expected,
        rtol=torch.finfo(weight.dtype).eps,
        atol=max(4 * (len(rows) + 1) * eps, torch.finfo(weight.dtype).smallest_normal),
    )


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_every_mix_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype], cpu_capability: str) -> None:
    for dim in (1, 7, 16, 33, 70):
        for beta in (1.0, 0.0, 0.5):
            indices = torch.randint(9, (4, 6))
            check(
                nonzero(9, dim, dtype=dtypes[0]), indices, nonzero(4, 6, dim, dtype=dtypes[1]), beta
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strides(dtype: torch.dtype) -> None:
    indices = torch.randint(9, (14,))
    for grad in read_layouts(14, 37, dtype).values():
        check(nonzero(9, 37), indices, grad)
    for beta in (1.0, 0.0):
        for weight in layouts(9, 37, dtype).values():
            check(weight, indices, nonzero(14, 37), beta)
    check(nonzero(9, 5), torch.randint(9, (6, 4)).t(), nonzero(4, 6, 5, dtype=dtype))
    check(nonzero(9, 5), torch.randint(9, (8,))[::2], nonzero(4, 5, dtype=dtype))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_index_dtypes_and_shapes(index_dtype: torch.dtype) -> None:
    for shape in ((), (5,), (2, 3), (2, 1, 4)):
        indices = torch.randint(9, shape, dtype=index_dtype)
        check(nonzero(9, 5), indices, nonzero(*shape, 5))


def test_options_of_embedding() -> None:
    indices = torch.tensor([[3, 0, 3, 7], [3, 7, 7, 8]])
    for padding_idx in (-1, 0, 3, 8):
        for by_frequency in (False, True):
            for beta in (1.0, 0.0):
                check(nonzero(9, 6), indices, nonzero(2, 4, 6), beta, padding_idx, by_frequency)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_agrees_with_autograd(padding_idx: int | None, by_frequency: bool) -> None:
    layer = torch.nn.Embedding(50, 24)
    indices = torch.randint(50, (8, 16))
    out = F.embedding(indices, layer.weight, padding_idx, scale_grad_by_freq=by_frequency)
    grad = torch.randn_like(out)
    out.backward(grad)
    weight = torch.zeros(50, 24)
    OPS.embedding_wgrad_(
        weight,
        indices,
        grad,
        padding_idx=-1 if padding_idx is None else padding_idx,
        scale_grad_by_freq=by_frequency,
    )
    assert_same_but_for_rounding(weight, layer.weight.grad)


def test_one_row_named_thousands_of_times() -> None:
    for tokens in (255, 257, 3000):
        check(nonzero(4, 40), torch.full((tokens,), 2), nonzero(tokens, 40, dtype=torch.bfloat16))


def test_rows_that_no_token_names_are_left_alone() -> None:
    weight = torch.full((6, 3), float("nan"))
    OPS.embedding_wgrad_(weight, torch.tensor([1]), torch.ones(1, 3))
    assert weight.isnan().all()
    weight = torch.full((6, 3), float("nan"))
    OPS.embedding_wgrad_(weight, torch.tensor([1]), torch.ones(1, 3), beta=0.0)
    assert torch.equal(weight, F.one_hot(torch.tensor(1), 6).float()[:, None].expand(6, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_thread_count_gives_the_same_bits(
    dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    indices = torch.randint(300, (2000,)) % torch.randint(1, 300, (2000,))
    grad, start = nonzero(2000, 130, dtype=dtype), nonzero(300, 130)
    results = []
    for threads in (1, 2, 3, 4, 7):
        set_num_threads(threads)
        weight = start.clone()
        OPS.embedding_wgrad_(weight, indices, grad, beta=0.5)
        results.append(weight)
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_zero_sizes() -> None:
    none = torch.empty(0, dtype=torch.long)
    for beta in (1.0, 0.0):
        check(nonzero(5, 7), none, torch.empty(0, 7), beta)
        check(nonzero(5, 0), torch.tensor([1, 2]), torch.empty(2, 0), beta)
        check(torch.empty(0, 7), none, torch.empty(0, 7), beta)
