"""The attention function behind "torch_ext"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_ext import attention
from torch_ext.integrations.transformers import hidden_keys, packed_sequences
from torch_ext.integrations.transformers.families import NAME

_scaled_dot_product_attention = torch.ops.torch_ext.scaled_dot_product_attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind ``attn_implementation="torch_ext"``; its signature is transformers'.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is None
        query: (batch, heads, q_len, head_dim)
        key: (batch, kv_heads, kv_len, head_dim)
        value: (batch, kv_heads, kv_len, value_dim)
        attention_mask: boolean (True = attend) or additive, broadcastable to
            (batch, heads, q_len, kv_len); None: causal where the layer is and q_len > 1
        dropout, scaling: dropout probability and scale of the scores
        is_causal: whether the layer is causal
        position_bias: added to the scores, broadcastable to (batch, heads, q_len, kv_len)
        **kwargs: ``softcap``: scaled scores become ``softcap * tanh(scores / softcap)``.
            ``s_aux`` (heads,) or ``sinks`` (batch, heads, q_len, 1) are attention sinks: one more
            score in the softmax, whose weight goes nowhere. ``indices`` (batch, q_len, chosen)
            or ``block_indices``: an indexer's choice of keys; all others are hidden.
            ``cu_seq_lens_q`` and ``cu_seq_lens_k``: the ends of packed sequences, which do not see
            each other. In a causal call of one row without a mask, ``position_ids`` that begin
            at 0 again say the same. ``output_attentions`` warns as ``sdpa`` does. All else is
            ignored, as it is by ``sdpa``.

    Returns:
        The output, (batch, q_len, heads, value_dim) and contiguous, and None for the weights.

    Raises:
        ValueError: for packed sequences or chosen blocks of keys that cannot be told apart here.
    """
    if kwargs.get("output_attentions"):
        _warn_about_weights()
    q_len, kv_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
        if is_causal is None:
            is_causal = _is_causal_by_assumption(module, q_len, kv_len)
    # q_len first: under torch.compile with dynamic shapes the result must stay a bool.
    is_causal = q_len > 1 and attention_mask is None and bool(is_causal)
    if is_causal and kv_len > q_len:
        # The first tokens in an empty static cache: causal is top-left here, and the keys behind
        # hold nothing yet.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        if position_bias is not None:
            position_bias = position_bias[..., :q_len]
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    options: dict[str, Any] = {
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "softcap": kwargs.get("softcap") or 0.0,
    }
    plain = attention_mask is None and position_bias is None and (sinks is None or sinks.dim() == 1)
    if plain and q_len > 1 and all(kwargs.get(n) is None for n in ("indices", "block_indices")):
        documents = packed_sequences.documents_of(query, key, is_causal, kwargs)
        if documents is not None:
            out = packed_sequences.attention_to_each(
                documents, query, key, value, dropout, is_causal, {**options, "sink": sinks}
            )
            return out.transpose(1, 2).contiguous(), None
    mask = hidden_keys.without_hidden_keys(module, query, key, attention_mask, is_causal, kwargs)
    if position_bias is not None:
        mask = hidden_keys.with_position_bias(position_bias, mask, is_causal, q_len, key.shape[2])
    is_causal = is_causal and mask is None
    if sinks is None or sinks.dim() == 1:
        out = _scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, sink=sinks, **options
        )
    else:
        out, logsumexp = attention.attention_forward(
            query, key, value, mask, dropout, is_causal, **options
        )
        out = _with_sinks(out, logsumexp, sinks)
    # Its memory is (batch, q_len, heads, value_dim) already.
    return out.transpose(1, 2).contiguous(), None


def _with_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Sinks that differ from token to token: one more score in the softmax leaves to the keys, of
    all the weight, the share exp(logsumexp) / (exp(logsumexp) + exp(sink)). A row without keys
    keeps 0: its share is 0."""
    sinks = sinks.to(logsumexp.dtype).squeeze(-1)
    # In the logsumexp's precision: a share rounded to bfloat16 would be as wrong as the output.
    return (out * torch.sigmoid(logsumexp - sinks).unsqueeze(-1)).to(out.dtype)


def _is_causal_by_assumption(module: nn.Module, q_len: int, kv_len: int) -> bool:
    """For a layer that does not say: ``sdpa`` takes it for causal. That holds for a decoder's own
    layers alone; all the layers within transformers that do not say belong to encoders or attend
    across (Mllama), and eager, which reads masks only, lets them see every key."""
    name = type(module).__name__.lower()
    if type(module).__module__.startswith("transformers.models.") or q_len != kv_len:
        return False
    if "cross" in name or "encoder" in name or getattr(module, "is_cross_attention", False):
        return False
    return not _is_encoder(getattr(module, "config", None))


def _is_encoder(config: Any) -> bool:
    """Families with a masked language model are encoders, unless configured to decode."""
    from transformers.models.auto import modeling_auto

    return getattr(
        config, "model_type", None
    ) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )


def _warn_about_weights() -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.torch_ext").warning_once(
        f"`{NAME}` attention does not support `output_attentions=True`."
        " Please set your attention to `eager` if you want any of these features."
    )
