"""torch.nn.attention.bias: causal masks that are a rule, not a tensor.

``causal_upper_left`` is ``is_causal=True``. ``causal_lower_right`` lets query i attend to the keys
up to i + kv_len - q_len; torch writes it out as a boolean mask on the CPU, here it is
``is_causal=True, causal_lower_right=True``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_ext.import_hooks import WhenImported
from torch_ext.torch_backends import (
    device_is_taken,
    forward_mode_is_on,
    graph_is_for_others,
    torch_backend_chosen,
)

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

__all__ = ["attention", "install", "is_causal_bias", "remove"]

# Importing it imports Dynamo, which takes seconds. A program that has not done so has no such mask.
_BIAS_MODULE = "torch.nn.attention.bias"

_stock_dispatch: Callable[..., Tensor] | None = None
_stock_attribute: Any = None  # the staticmethod around it
_installed = False


def is_causal_bias(mask: Any) -> bool:
    """Whether a mask is one of torch.nn.attention.bias."""
    # Asked first: a look into sys.modules becomes a guard of the graph that Dynamo traces, which
    # fails as soon as the module is imported, by Dynamo itself for one.
    if type(mask) is Tensor or type(mask) is torch.nn.Parameter:
        return False
    module = sys.modules.get(_BIAS_MODULE)
    return module is not None and isinstance(mask, module.CausalBias)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: CausalBias,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """Scaled dot product attention under a causal bias, fused.

    Args:
        query: (batch..., heads, q_len, head_dim)
        key: (batch..., kv_heads, kv_len, head_dim)
        value: (batch..., kv_heads, kv_len, value_dim)
        attn_mask: ``causal_upper_left(q_len, kv_len)`` or ``causal_lower_right(q_len, kv_len)``
        dropout_p, scale, enable_gqa: as in scaled_dot_product_attention
        is_causal: must be False, as in torch
        options: further ones of scaled_dot_product_attention, whose diagonal is the bias's

    Returns:
        (batch..., heads, q_len, value_dim). A query that the lower-right triangle leaves without
        keys (q_len > kv_len) gives 0.

    Raises:
        ValueError: with ``is_causal=True``, or for a lower-right bias of other lengths than those
            of query and key.
    """
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    lower_right = _is_lower_right(attn_mask)
    q_len, kv_len = query.size(-2), key.size(-2)
    if lower_right and (attn_mask.seq_len_q != q_len or attn_mask.seq_len_kv != kv_len):
        raise ValueError(
            "torch_ext::scaled_dot_product_attention: attn_mask takes a causal_lower_right of "
            f"query's and key's lengths ({q_len}, {kv_len}), got causal_lower_right"
            f"({attn_mask.seq_len_q}, {attn_mask.seq_len_kv})"
        )
    options["causal_lower_right"] = lower_right or options.get("causal_lower_right", False)
    return torch.ops.torch_ext.scaled_dot_product_attention(
        query,
        key,
        value,
        None,
        dropout_p,
        True,
        scale=scale,
        enable_gqa=enable_gqa,
        **options,
    )


def _is_lower_right(bias: CausalBias) -> bool:
    # On a square both triangles are the same.
    return bias.variant.name == "LOWER_RIGHT" and bias.seq_len_q != bias.seq_len_kv


def _takes(query: Tensor, key: Tensor, value: Tensor, bias: CausalBias) -> bool:
    """Whether F.scaled_dot_product_attention under the bias is torch_ext's, by its own rules."""
    device = query.device.type
    return (
        _is_lower_right(bias)
        and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in (query, key, value))
        and all(t.layout == torch.strided for t in (query, key, value))
        and query.dim() >= 2
        and key.dim() >= 2
        and query.dtype.is_floating_point
        and bias.seq_len_q == query.size(-2)
        and bias.seq_len_kv == key.size(-2)
        and device_is_taken(device)
        and not torch_backend_chosen(device)
        and not graph_is_for_others()
        and not forward_mode_is_on()
    )


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: CausalBias,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if _installed and not is_causal and _takes(query, key, value, attn_mask):
        return attention(
            query, key, value, attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    # The upper-left triangle comes back to the override as is_causal=True.
    return _stock_dispatch(  # type: ignore[misc]
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def install() -> None:
    """Sends F.scaled_dot_product_attention under a lower-right bias to `attention`."""
    global _installed
    _installed = True
    _when_imported.wait()


def remove() -> None:
    """Gives the dispatch of CausalBias back to torch."""
    global _installed
    _installed = False
    _when_imported.stop()
    module = sys.modules.get(_BIAS_MODULE)
    if (
        module is not None
        and _stock_attribute is not None
        and module.CausalBias._dispatch is _dispatch
    ):
        module.CausalBias._dispatch = _stock_attribute


def _install_in(module: ModuleType) -> None:
    global _stock_dispatch, _stock_attribute
    if module.CausalBias._dispatch is not _dispatch:
        _stock_dispatch = module.CausalBias._dispatch
        _stock_attribute = vars(module.CausalBias)["_dispatch"]
        module.CausalBias._dispatch = staticmethod(_dispatch)


def _imported(module: ModuleType) -> None:
    if _installed:
        _install_in(module)


_when_imported = WhenImported(_BIAS_MODULE, "CausalBias", _imported)
