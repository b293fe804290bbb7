"""Keys and values in pages: the same bits as in one piece, stored numbers, what is never read."""

from __future__ import annotations

import pytest
import torch
from attention_cases import HALF_DTYPES
from torch import Tensor
from varlen_cases import cumulative

import torch_ext

_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


class _Aux:
    lse = True


def _pages(
    rows: Tensor, lengths: list[int], page_size: int, *, spare: int = 2
) -> tuple[Tensor, Tensor]:
    """(cache, block_table) that hold packed rows in shuffled pages; what is unused is NaN."""
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts) + spare
    cache = torch.full((total, page_size, *rows.shape[1:]), torch.nan).to(rows.dtype)
    free = torch.randperm(total).tolist()
    table = torch.full((len(lengths), max([*counts, 0]) + 1), -1, dtype=torch.int32)
    first = 0
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for page in range(count):
            entry = table[index, page] = free.pop()
            part = rows[first : first + length][page * page_size : (page + 1) * page_size]
            cache[entry, : len(part)] = part
        first += length
    return cache, table


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 100])
@pytest.mark.parametrize("q_lens", [(1, 1, 1, 1), (2, 1, 1, 2), (30, 1, 70, 5)], ids=str)
def test_pages_give_the_bits_of_packed_rows(
    q_lens: tuple[int, ...], page_size: int, dtype: torch.dtype
) -> None:
    k_lens = [90, 1, 200, 33]
    heads, kv_heads = 4, 2
    query = torch.randn(sum(q_lens), heads, 24).to(dtype)
    key, value = torch.randn(2, sum(k_lens), kv_heads, 24).to(dtype).unbind()
    options = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": _Aux}
    sink = torch.randn(heads)
    expected = torch_ext.varlen_attn(
        query,
        key,
        value,
        cumulative(q_lens),
        cumulative(k_lens),
        max(q_lens),
        max(k_lens),
        sink=sink,
        **options,
    )
    torch.manual_seed(3)
    key_cache, table = _pages(key, k_lens, page_size)
    torch.manual_seed(3)
    value_cache, _ = _pages(value, k_lens, page_size)
    actual = torch_ext.varlen_attn(
        query,
        key_cache,
        value_cache,
        cumulative(q_lens),
        None,
        max(q_lens),
        max(k_lens),
        seqused_k=torch.tensor(k_lens),
        block_table=table,
        sink=sink,
        **options,
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("q_len", [1, 40])
def test_stored_numbers_are_read_as_they_are(
    q_len: int, per_head: bool, dtype: torch.dtype, stored: torch.dtype
) -> None:
    k_lens, kv_heads, heads = [70, 33], 2, 4
    query = torch.randn(2 * q_len, heads, 32).to(dtype)
    k_scale = torch.tensor([0.02, 0.03]) if per_head else torch.tensor(0.02)
    v_scale = torch.tensor([0.05, 0.01]) if per_head else torch.tensor(0.04)
    numbers = torch.randint(-100, 100, (2, sum(k_lens), kv_heads, 32)).float()
    if stored is torch.float8_e4m3fn:
        numbers = (numbers / 4).to(stored).float()
    caches = []
    for rows in numbers:
        torch.manual_seed(5)
        cache, table = _pages(rows, k_lens, 16)
        caches.append(cache.nan_to_num(0).to(stored))
    actual = torch_ext.varlen_attn(
        query,
        *caches,
        cumulative([q_len, q_len]),
        None,
        q_len,
        max(k_lens),
        enable_gqa=True,
        seqused_k=torch.tensor(k_lens),
        block_table=table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    key, value = (
        rows.double() * scale.double().reshape(-1, 1)
        for rows, scale in zip(numbers, (k_scale, v_scale), strict=True)
    )
    expected = torch_ext.varlen_attn(
        query.double(),
        key,
        value,
        cumulative([q_len, q_len]),
        cumulative(k_lens),
        q_len,
        max(k_lens),
        enable_gqa=True,
    )
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= (4e-6 if dtype is torch.float32 else 6e-3)


def test_every_float8_number() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    stored = bits.view(torch.float8_e4m3fn)
    finite = stored.float().isfinite()
    value = stored[finite].reshape(1, -1, 1, 1)
    rows = value.size(1)
    # One query that attends to one key: out is the value.
    out = torch_ext.varlen_attn(
        torch.zeros(rows, 1, 8),
        torch.zeros(1, rows, 1, 8).to(torch.float8_e4m3fn),
        value.repeat(1, 1, 1, 8),
        torch.arange(rows + 1),
        None,
        1,
        rows,
        seqused_k=torch.arange(1, rows + 1),
        window_size=(0, 0),
        block_table=torch.zeros(rows, 1, dtype=torch.int32),
        k_scale=torch.tensor(1.0),
        v_scale=torch.tensor(1.0),
    )
    assert torch.equal(out[:, 0, 0], stored[finite].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_table": torch.tensor([[0, 7]], dtype=torch.int32)},
            "block_table takes pages from 0",
        ),
        ({"block_table": torch.tensor([[-1, 0]], dtype=torch.int32)}, "got -1 at "),
        ({"block_table": torch.tensor([[0, 1]])}, "block_table takes a dense Int tensor"),
        (
            {"seqused_k": torch.tensor([9])},
            "seqused_k takes 0 up to the rows of each sequence's pages",
        ),
        ({"seqused_k": None}, "seqused_k takes a tensor where there is a block_table"),
        ({"max_k": 5}, "max_k takes the length of the longest sequence or more, got 5"),
        ({"k_scale": torch.tensor(1.0)}, "k_scale takes None with a cache of Float"),
        (
            {"key": torch.zeros(3, 4, 2, 8, dtype=torch.int8)},
            "value takes the dtype and device of key",
        ),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    arguments = {
        "query": torch.randn(2, 2, 8),
        "key": torch.randn(3, 4, 2, 8),
        "value": torch.randn(3, 4, 2, 8),
        "cu_seq_q": torch.tensor([0, 2]),
        "cu_seq_k": None,
        "max_q": 2,
        "max_k": 8,
        "seqused_k": torch.tensor([6]),
        "block_table": torch.tensor([[2, 0]], dtype=torch.int32),
    }
    torch_ext.varlen_attn(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch_ext.varlen_attn(**{**arguments, **changes})


def test_pages_do_not_train() -> None:
    with pytest.raises(
        RuntimeError, match="block_table, keys and values in pages, is for inference"
    ):
        torch_ext.varlen_attn(
            torch.randn(1, 2, 8, requires_grad=True),
            *torch.randn(2, 3, 4, 2, 8).unbind(),
            torch.tensor([0, 1]),
            None,
            1,
            4,
            seqused_k=torch.tensor([4]),
            block_table=torch.tensor([[1]], dtype=torch.int32),
        )
