"""Documents laid end to end in one row: which of them a call has, and attention to each alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_varlen_attention = torch.ops.torch_ext.varlen_attention


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row begin and end, as varlen_attn takes it."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


def documents_of(
    query: Tensor, key: Tensor, is_causal: bool, kwargs: dict[str, Any]
) -> Documents | None:
    """The documents of a row without a mask; None where it is one document, or not a row.

    ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say it, or ``position_ids`` that begin at 0 again. The
    latter with a cache and with a mask of ones too, where transformers itself no longer looks.
    """
    if query.shape[0] != 1 or query.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    q_len, kv_len = query.shape[2], key.shape[2]
    ends_q, ends_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if ends_q is None and ends_k is None:
        ends_q = ends_k = _ends_by_position(kwargs.get("position_ids"), q_len, kv_len, is_causal)
    if ends_q is None or ends_k is None or ends_q.shape != ends_k.shape:
        return None
    if int(ends_q[-1]) != q_len or int(ends_k[-1]) != kv_len:
        return None
    if is_causal and not torch.equal(ends_q, ends_k):
        # Which corner the diagonal starts from is the mask's to say.
        return None
    return Documents(ends_q, ends_k, _longest(ends_q), _longest(ends_k))


def attention_to_each(
    documents: Documents,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    """(1, heads, q_len, value_dim). options: scale, enable_gqa, softcap, sink."""
    out, _ = _varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.cu_seq_q,
        documents.cu_seq_k,
        documents.max_q,
        documents.max_k,
        dropout,
        window_size=(-1, 0) if is_causal else (-1, -1),
        **options,
    )
    return out.transpose(0, 1).unsqueeze(0)


def _longest(ends: Tensor) -> int:
    return int(ends.diff().max()) if len(ends) > 1 else 0


def _ends_by_position(
    position_ids: Tensor | None, q_len: int, kv_len: int, is_causal: bool
) -> Tensor | None:
    """Documents begin where positions do not go on by one. Only where each begins at 0: positions
    that jump for another reason, as an image's do, make no documents."""
    if position_ids is None or not is_causal or q_len != kv_len or position_ids.shape != (1, q_len):
        return None
    row = position_ids[0]
    begins = (row.diff() != 1).nonzero().flatten() + 1
    if len(begins) == 0 or bool((row[begins] != 0).any()) or int(row[0]) != 0:
        return None
    ends = [begins.new_zeros(1), begins, begins.new_full((1,), q_len)]
    return torch.cat(ends).to(torch.int32)
