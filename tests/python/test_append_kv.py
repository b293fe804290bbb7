"""append_kv_: rows into pages, in place."""

from __future__ import annotations

import pytest
import torch

import torch_ext


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_go_to_their_slots(dtype: torch.dtype) -> None:
    key_cache, value_cache = (
        torch.zeros(3, 4, 2, 8, dtype=dtype),
        torch.zeros(3, 4, 2, 5, dtype=dtype),
    )
    key, value = torch.randn(5, 2, 8).to(dtype), torch.randn(5, 2, 5).to(dtype)
    slots = torch.tensor([11, 0, -1, 5, 0])
    torch_ext.append_kv_(key_cache, value_cache, key, value, slots)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        expected = torch.zeros_like(cache)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot >= 0:
                expected[slot // 4, slot % 4] = row
        assert torch.equal(cache, expected)


def test_any_strides() -> None:
    key_cache = torch.zeros(3, 2, 8, 4).permute(0, 3, 1, 2)
    value_cache = torch.zeros(6, 4, 2, 16)[::2, :, :, ::2]
    key, value = torch.randn(8, 2, 3).permute(2, 1, 0), torch.randn(3, 2, 8)
    torch_ext.append_kv_(key_cache, value_cache, key, value, torch.tensor([2, 7, 9]))
    for row, slot in enumerate([2, 7, 9]):
        assert torch.equal(key_cache[slot // 4, slot % 4], key[row])
        assert torch.equal(value_cache[slot // 4, slot % 4], value[row])


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_stored_numbers_are_rounded_and_clamped(stored: torch.dtype) -> None:
    cache = torch.zeros(1, 4, 2, 8, dtype=stored)
    other = torch.zeros_like(cache)
    rows = torch.randn(3, 2, 8) * 3
    rows[0, 0, 0], rows[0, 0, 1] = 1e6, -1e6
    scale = torch.tensor([0.05, 0.1])
    torch_ext.append_kv_(
        cache, other, rows, rows, torch.tensor([0, 1, 2]), k_scale=scale, v_scale=torch.tensor(0.07)
    )
    limits = (-128, 127) if stored is torch.int8 else (-448, 448)

    def expected(scale: torch.Tensor) -> torch.Tensor:
        numbers = (rows / scale).clamp(*limits)
        return (numbers.round() if stored is torch.int8 else numbers).to(stored)

    assert torch.equal(cache[0, :3].float(), expected(scale[:, None]).float())
    assert torch.equal(other[0, :3].float(), expected(torch.tensor(0.07)).float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 12])}, "slot_mapping takes slots below 12"),
        ({"slot_mapping": torch.tensor([0])}, "slot_mapping takes a dense Int or Long tensor"),
        ({"key": torch.randn(2, 2, 7)}, "key takes the shape"),
        ({"key": torch.randn(2, 2, 8).double()}, "key_cache takes Double, Char or Float8_e4m3fn"),
        ({"value": torch.randn(3, 2, 8)}, "value takes the rows of key, 2, got 3"),
        ({"k_scale": torch.tensor(1.0)}, "k_scale takes None"),
    ],
)
def test_refused_before_anything_is_written(changes: dict[str, object], message: str) -> None:
    caches = torch.zeros(2, 3, 4, 2, 8).unbind()
    arguments = {
        "key": torch.randn(2, 2, 8),
        "value": torch.randn(2, 2, 8),
        "slot_mapping": torch.tensor([0, 5]),
    }
    with pytest.raises(RuntimeError, match=message):
        torch_ext.append_kv_(*caches, **{**arguments, **changes})
    assert not any(cache.any() for cache in caches)


def test_autograd_and_versions() -> None:
    caches = torch.zeros(2, 3, 4, 2, 8).unbind()
    rows, slots = torch.randn(2, 2, 8), torch.tensor([0, 5])
    before = [cache._version for cache in caches]
    torch_ext.append_kv_(*caches, rows, rows, slots)
    assert all(cache._version > old for cache, old in zip(caches, before, strict=True))
    rows.requires_grad_()
    with pytest.raises(RuntimeError, match="a cache is for inference"):
        torch_ext.append_kv_(*caches, rows, rows, slots)
    with torch.no_grad():
        torch_ext.append_kv_(*caches, rows, rows, slots)


def test_compiled() -> None:
    caches = torch.zeros(2, 3, 4, 2, 8).unbind()
    rows, slots = torch.randn(2, 2, 8), torch.tensor([3, 5])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def append(key_cache, value_cache, rows, slots):  # type: ignore[no-untyped-def]
        torch_ext.append_kv_(key_cache, value_cache, rows, rows + 1, slots)
        return key_cache.sum()

    append(*caches, rows, slots)
    assert torch.equal(caches[0][0, 3], rows[0])
    assert torch.equal(caches[1][1, 1], rows[1] + 1)
