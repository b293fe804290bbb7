"""What hides keys beside the mask: an indexer's choice, packed sequences; and the position bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.integrations.transformers.families import NAME


def without_hidden_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The mask, narrowed to the keys that ``indices``, ``block_indices`` and packing leave."""
    mask = attention_mask
    if kwargs.get("block_indices") is not None:
        mask = _in_chosen_blocks(module, query, key, mask, kwargs)
    shown = None
    if kwargs.get("indices") is not None:
        shown = _chosen(kwargs["indices"], key.shape[2])
    if kwargs.get("cu_seq_lens_k") is not None:
        same = _same_sequence(module, query, key, kwargs)
        shown = same if shown is None else shown & same
    if shown is None:
        return mask
    if mask is None:
        return shown & _lower_triangle(query.shape[2], key.shape[2], key) if is_causal else shown
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)


def with_position_bias(
    position_bias: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    q_len: int,
    kv_len: int,
) -> Tensor:
    """One additive mask. Hidden positions get the dtype's lowest number, as in transformers: a row
    of nothing but padding then averages its values there and here."""
    lowest = torch.finfo(position_bias.dtype).min
    if attention_mask is None:
        if not is_causal:
            return position_bias
        attention_mask = _lower_triangle(q_len, kv_len, position_bias)
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, lowest)
    return position_bias + attention_mask


def _lower_triangle(q_len: int, kv_len: int, like: Tensor) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=like.device).tril()


def _chosen(indices: Tensor, kv_len: int) -> Tensor:
    """(batch, 1, q_len, kv_len): the keys that DeepSeek's indexer chose, (batch, q_len, chosen)."""
    none = indices.new_zeros((*indices.shape[:2], kv_len), dtype=torch.bool)
    return none.scatter(-1, indices.long(), True).unsqueeze(1)


def _in_chosen_blocks(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """MiniMax M3's indexer builds the mask for "sdpa" itself; the layer asks it there only."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise ValueError(
            f'torch_ext: attn_implementation="{NAME}" takes `block_indices` from layers whose '
            f"indexer has build_block_mask, got {type(module).__name__}; use "
            'attn_implementation="sdpa" with torch_ext.enable() for this model'
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(kv_len - q_len, kv_len, device=query.device)
    positions = positions.expand(query.shape[0], -1)
    return build(kwargs["block_indices"], mask, kv_len, query.dtype, query.device, positions)


def _same_sequence(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(q_len, kv_len): whether query and key lie in one of the packed sequences."""
    ends = [kwargs.get("cu_seq_lens_q"), kwargs["cu_seq_lens_k"]]
    lengths = [query.shape[2], key.shape[2]]
    if (
        ends[0] is None
        or query.shape[0] != 1
        or any(int(end[-1]) != length for end, length in zip(ends, lengths, strict=True))
    ):
        raise ValueError(
            f'torch_ext: attn_implementation="{NAME}" takes `cu_seq_lens_q` and `cu_seq_lens_k` '
            f"that end at the lengths of one packed row, got them from {type(module).__name__} "
            f"with batch {query.shape[0]}, {lengths[0]} queries and {lengths[1]} keys; "
            "leave out the cache (use_cache=False)"
        )
    query_sequence, key_sequence = (
        torch.searchsorted(end, torch.arange(length, device=end.device), right=True)
        for end, length in zip(ends, lengths, strict=True)
    )
    return query_sequence[:, None] == key_sequence
