"""What the tests of the mini-batch operators share: tensors of every kind, errors in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

OPS = torch.ops.torch_ext
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPE_PAIRS = tuple(itertools.product(DTYPES, DTYPES))
DTYPE_TRIPLES = tuple(itertools.product(DTYPES, DTYPES, DTYPES))


def dtype_id(value: object) -> str:
    """For parametrize(ids=): float32 rather than torch.float32."""
    return str(value).removeprefix("torch.")


def nonzero(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers in +-[1/4, 2)."""
    magnitude = torch.rand(shape, dtype=torch.float64) * 1.75 + 0.25
    sign = torch.randint(2, shape, dtype=torch.float64) * 2 - 1
    return (magnitude * sign).to(dtype)


def assert_one_rounding(actual: Tensor, exact: Tensor, terms: int = 1) -> None:
    """``actual`` is ``exact`` (float64) rounded to its dtype, give or take ``terms`` roundings of
    numbers of the order of 1 in the type it was computed in."""
    assert exact.dtype is torch.float64
    info = torch.finfo(actual.dtype)
    computed = torch.finfo(torch.float64 if actual.dtype is torch.float64 else torch.float32).eps
    torch.testing.assert_close(
        actual.double(), exact, rtol=info.eps, atol=max(8 * terms * computed, info.smallest_normal)
    )


def layouts(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """(rows, cols) tensors with every kind of strides, distinct elements in distinct places."""
    return {
        "dense": nonzero(rows, cols, dtype=dtype),
        "transposed": nonzero(cols, rows, dtype=dtype).t(),
        "padded": nonzero(rows, cols + 3, dtype=dtype)[:, :cols],
        "offset": nonzero(rows, cols + 3, dtype=dtype)[:, 3:],
        "every_second": nonzero(rows, 2 * cols, dtype=dtype)[:, ::2],
        "every_second_row": nonzero(2 * rows, cols, dtype=dtype)[1::2],
        "inner_of_three": nonzero(rows, 3, cols, dtype=dtype)[:, 1],
    }


def read_layouts(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those, and tensors whose elements share places."""
    return layouts(rows, cols, dtype) | {
        "expanded_rows": nonzero(cols, dtype=dtype).expand(rows, cols),
        "expanded_cols": nonzero(rows, 1, dtype=dtype).expand(rows, cols),
        "expanded_all": nonzero(dtype=dtype).expand(rows, cols),
    }
