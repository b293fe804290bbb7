"""Caches of keys and values in pages."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append_kv_"]

_append_kv = torch.ops.torch_ext.append_kv_.default


def append_kv_(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes rows of keys and values into the pages of a cache, in place.

    Args:
        key_cache: (pages, page_size, kv_heads, head_dim), of key's dtype, int8 or float8_e4m3fn.
        value_cache: (pages, page_size, kv_heads, value_dim), of the same dtype.
        key: (rows, kv_heads, head_dim).
        value: (rows, kv_heads, value_dim).
        slot_mapping: int32 or int64, (rows): ``page * page_size + row`` of each row; negative ones
            are skipped. Where two rows have one slot, the later one stays.
        k_scale: float32, () or (kv_heads), with int8 and float8 caches: ``stored * k_scale`` is the
            key. Rounded to nearest, and to the nearest end of the range.
        v_scale: likewise.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got, before it writes.
    """
    _append_kv(key_cache, value_cache, key, value, slot_mapping, k_scale=k_scale, v_scale=v_scale)
