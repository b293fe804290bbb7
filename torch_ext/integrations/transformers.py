"""torch_ext as an attention implementation of Hugging Face transformers.

    from torch_ext.integrations import transformers as torch_ext_hf
    torch_ext_hf.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="torch_ext")

It is what ``attn_implementation="sdpa"`` is, with torch_ext's kernels under it whether or not
``torch_ext.enable()`` is on: the same masks, caches and refusals (no soft-capping of logits, no
attention weights), and key and value heads shared by several query heads are never repeated.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.integrations.trainer import GradientAccumulationMixin

__all__ = ["NAME", "GradientAccumulationMixin", "attention_forward", "attention_mask", "register"]

NAME = "torch_ext"

# The first with AttentionMaskInterface. Without a mask function of its own a registered
# implementation gets no mask at all, padding or not.
_OLDEST = "4.53"

# Terms of some models' attention that softmax(scale * q k^T + mask) v lacks: without them the
# result would be wrong in silence. softcap as sdpa refuses it; then attention sinks, chosen keys.
_REFUSED = ("softcap", "s_aux", "sinks", "indices", "block_indices")

_sdpa_mask: Any = None


def register() -> None:
    """Registers "torch_ext" with AttentionInterface and AttentionMaskInterface; again, harmlessly.

    Raises:
        ImportError: without transformers, or with one that has no AttentionMaskInterface.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"torch_ext.integrations.transformers takes transformers {_OLDEST} or newer, got none: "
            "pip install transformers"
        ) from error
    try:
        masking = importlib.import_module("transformers.masking_utils")
        attention_interface = importlib.import_module("transformers").AttentionInterface
        mask_interface = masking.AttentionMaskInterface
        sdpa_mask = masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"torch_ext.integrations.transformers takes transformers {_OLDEST} or newer, "
            f"got {getattr(library, '__version__', 'an unknown version')}"
        ) from error
    global _sdpa_mask
    _sdpa_mask = sdpa_mask
    attention_interface.register(NAME, attention_forward)
    mask_interface.register(NAME, attention_mask)


def attention_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """``sdpa``'s mask: boolean, True = attend, or None where causal or no masking says the same.

    Gemma 4 cuts queries off behind the mask's back where only the last logits are wanted, unless
    there is no mask and the implementation is named "sdpa": it always gets one.
    """
    if str(getattr(options.get("config"), "model_type", "")).startswith("gemma4"):
        options["allow_is_causal_skip"] = False
    return _sdpa_mask(*arguments, **options)


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

    Returns:
        The output, (batch, q_len, heads, value_dim) and contiguous, and None for the weights.

    Raises:
        ValueError: for what would be left out in silence: ``softcap`` (as ``sdpa`` does), attention
            sinks (``s_aux``, ``sinks``), and keys chosen by an indexer (``indices``,
            ``block_indices``).
    """
    for term in _REFUSED:
        if kwargs.get(term) is not None:
            raise ValueError(
                f'torch_ext: attn_implementation="{NAME}" takes no `{term}`, got one from '
                f'{type(module).__name__}; use attn_implementation="eager" for this model'
            )
    q_len, kv_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # q_len first: under torch.compile with dynamic shapes the result must stay a bool.
    is_causal = q_len > 1 and attention_mask is None and bool(is_causal)
    if is_causal and kv_len > q_len:
        # The first tokens in an empty static cache: causal is top-left here, and what lies behind
        # holds nothing yet.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        if position_bias is not None:
            position_bias = position_bias[..., :q_len]
        kv_len = q_len
    if position_bias is not None:
        attention_mask = _with_position_bias(
            position_bias, attention_mask, is_causal, q_len, kv_len
        )
        is_causal = False
    out = torch.ops.torch_ext.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    # Its memory is (batch, q_len, heads, value_dim) already.
    return out.transpose(1, 2).contiguous(), None


def _with_position_bias(
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
        attention_mask = torch.ones(
            q_len, kv_len, dtype=torch.bool, device=position_bias.device
        ).tril()
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, lowest)
    return position_bias + attention_mask
