"""Sends nn.MultiheadAttention's self-attention to torch_ext::self_attention under the drop-in.

The dispatcher never sees a multi-head layer in training, only its projections and its attention, so
the whole-layer operator is reached from Python: `install` puts a forward in front of the stock one
in the class, `remove` takes it away again. Modules, hooks, subclasses and state dicts are left as
they are: what changes is one entry in the class's dictionary, and only while the drop-in is on.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext import _C
from torch_ext.torch_backends import (
    device_is_taken,
    forward_mode_is_on,
    graph_is_for_others,
    torch_backend_chosen,
)

__all__ = ["install", "is_installed", "remove"]

_NO_KERNELS = "torch: no kernels for this device"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _is_plain(tensor: Any) -> bool:
    # Subclasses and parametrized stand-ins keep the path that knows them.
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


def _takes_module(module: nn.MultiheadAttention, query: Tensor) -> bool:
    """Whether the module has self_attention's parameter layout, in dtypes that go together."""
    if (
        not module._qkv_same_embed_dim
        or module.bias_k is not None
        or module.bias_v is not None
        or module.add_zero_attn
        or not _is_plain(module.in_proj_weight)
        or not _is_plain(module.out_proj.weight)
    ):
        return False
    in_proj_bias, out_proj_bias = module.in_proj_bias, module.out_proj.bias
    if (in_proj_bias is not None and not _is_plain(in_proj_bias)) or (
        out_proj_bias is not None and not _is_plain(out_proj_bias)
    ):
        return False
    if torch.is_autocast_enabled(query.device.type):
        return True  # the operator's autocast rule brings them to one dtype
    dtype = query.dtype
    return (
        module.in_proj_weight.dtype == dtype
        and module.out_proj.weight.dtype == dtype
        and (in_proj_bias is None or in_proj_bias.dtype == dtype)
        and (out_proj_bias is None or out_proj_bias.dtype == dtype)
    )


def _takes_masks(
    module: nn.MultiheadAttention,
    query: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether the masks have nn.MultiheadAttention's shapes and dtypes; its path names errors."""
    batch = query.size(0) if query.dim() == 3 else 1
    length = query.size(-2)
    if attn_mask is not None:
        if not _is_plain(attn_mask) or attn_mask.dtype not in (torch.bool, query.dtype):
            return False
        if attn_mask.dim() == 3:
            if attn_mask.size(0) != batch * module.num_heads:
                return False
        elif attn_mask.dim() != 2:
            return False
        if attn_mask.size(-2) != length or attn_mask.size(-1) != length:
            return False
    if key_padding_mask is not None:
        if not _is_plain(key_padding_mask):
            return False
        if key_padding_mask.dtype not in (torch.bool, query.dtype):
            return False
        if attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            return False  # deprecated in torch: its own path warns
        if key_padding_mask.dim() != query.dim() - 1 or key_padding_mask.size(-1) != length:
            return False
        if query.dim() == 3 and key_padding_mask.size(0) != batch:
            return False
    return True


def _stock_takes_fast_path(
    module: nn.MultiheadAttention,
    query: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether stock would run its inference fast path, which differs from its other path.

    It never looks at is_causal, a hint that attn_mask is the causal mask; the other path believes
    it where there is no padding. And its output is contiguous; the other path's lies in memory as
    (seq, batch, embed). The module and query are ones that `_takes` takes.
    """
    parameters = (
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
    )
    return (
        not module.training
        and module.num_heads % 2 == 0
        and module.in_proj_bias is not None
        and query.dim() == 3
        and query.dtype == module.in_proj_weight.dtype == module.in_proj_bias.dtype
        and (attn_mask is None or attn_mask.dtype == torch.bool)
        and (key_padding_mask is None or key_padding_mask.dtype == torch.bool)
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled()
        and not (
            torch.is_grad_enabled()
            and (query.requires_grad or any(p is not None and p.requires_grad for p in parameters))
        )
    )


def _why_torch(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> str | None:
    """Why the layer stays stock's, with fused attention in it where that is possible; or None."""
    if need_weights:
        return "torch: weights asked for (need_weights=True)"
    # Sequence first is left to the stock path, whose output is contiguous in that order.
    if (
        query is not key
        or key is not value
        or not _is_plain(query)
        or not (query.dim() == 2 or (query.dim() == 3 and module.batch_first))
        or query.dtype not in _DTYPES
        or query.size(-1) != module.embed_dim
        or (is_causal and attn_mask is None)  # an error, or, in the fast path, no mask
        or not _takes_module(module, query)
        or not _takes_masks(module, query, key_padding_mask, attn_mask)
    ):
        return "torch: nn.MultiheadAttention with what self_attention does not take"
    device = query.device.type
    if not device_is_taken(device):
        return "torch: CUDA tensors need enable(cuda=True)" if device == "cuda" else _NO_KERNELS
    if torch_backend_chosen(device):
        return "torch: sdpa_kernel(...) leaves out a backend of this device"
    if forward_mode_is_on():
        return "torch: forward-mode automatic differentiation"
    if graph_is_for_others():
        return "torch: the graph is traced or exported to ONNX"
    return None


def _as_boolean_padding(key_padding_mask: Tensor) -> Tensor | None:
    """A floating mask of nothing but 0 and -inf as the boolean one that it was made from, or None.

    nn.TransformerEncoder(Layer) turns a boolean padding mask into this before nn.MultiheadAttention
    sees it; as a boolean mask the padded tiles are skipped. Compiled and transformed code cannot
    look at values.
    """
    if (
        torch.compiler.is_compiling()
        or key_padding_mask.requires_grad
        or key_padding_mask.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    ignore = key_padding_mask == float("-inf")
    if bool(torch.logical_or(ignore, key_padding_mask == 0).all()):
        return ignore
    return None


def _self_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """query: (batch, seq, embed) or (seq, embed); the masks as nn.MultiheadAttention's."""
    batched = query.dim() == 3
    source = query if batched else query.unsqueeze(0)
    batch, length = source.size(0), source.size(1)
    fast_path = _stock_takes_fast_path(module, query, key_padding_mask, attn_mask)
    # As in F.multi_head_attention_forward: beside padding attn_mask counts, not the hint.
    is_causal = is_causal and key_padding_mask is None and not fast_path
    if is_causal:
        attn_mask = None
    elif attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.logical_not()  # nn.MultiheadAttention: True = ignore
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, module.num_heads, length, length)
    if key_padding_mask is not None:
        if not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if key_padding_mask.dtype != torch.bool:
            additive = key_padding_mask
            key_padding_mask = _as_boolean_padding(additive)
            if key_padding_mask is None:
                bias = additive.view(batch, 1, 1, length)
                attn_mask = bias if attn_mask is None else attn_mask + bias
    out = torch.ops.torch_ext.self_attention(
        source,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
        module.num_heads,
        attn_mask,
        module.dropout if module.training else 0.0,
        is_causal,
        key_padding_mask=key_padding_mask,
    )
    if not batched:
        return out.squeeze(0)
    # Dropout draws its numbers in the order of memory: in another order than stock's the layers
    # behind this one would drop other elements, eager and scripted.
    if fast_path:
        return out
    out = out.transpose(0, 1)
    if batch == 1 or length == 1:  # contiguous() would keep the stride of the one
        out = out.reshape(batch * length, -1).view(length, batch, -1)
    return out.contiguous().transpose(0, 1)


def _routed(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, the class's own forward, with self-attention taken out of it."""
    why_torch, self_attention, routing = _why_torch, _self_attention, is_installed
    record = _C.record_attention_path

    def forward(
        self: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if routing():
            reason = why_torch(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
            )
            if reason is None:
                return self_attention(self, query, key_padding_mask, attn_mask, is_causal), None
            if not torch.compiler.is_compiling():
                record(reason)  # attention that runs fused inside says so afterwards
        return stock(
            self,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    # torch.jit.script compiles the source of what is wrapped, with the names of what wraps it:
    # stock source, so stock names. Ours are all in the closure.
    routed = types.FunctionType(
        forward.__code__, stock.__globals__, "forward", forward.__defaults__, forward.__closure__
    )
    return functools.update_wrapper(routed, stock)


_installed = False
_stock_forward: Callable[..., Any] | None = None
_forward: Callable[..., Any] | None = None


def is_installed() -> bool:
    """Whether self-attention is being routed."""
    return _installed


def install() -> None:
    """Routes nn.MultiheadAttention; leaves a forward alone that somebody else has put there."""
    global _installed, _stock_forward, _forward
    current = nn.MultiheadAttention.forward
    if current is not _forward:
        if current.__module__ != "torch.nn.modules.activation":
            return
        if current is not _stock_forward:
            _stock_forward, _forward = current, _routed(current)
        nn.MultiheadAttention.forward = _forward
    _installed = True


def remove() -> None:
    """Puts the stock forward back; one wrapped meanwhile by somebody else only stops routing."""
    global _installed
    _installed = False
    if _forward is not None and nn.MultiheadAttention.forward is _forward:
        nn.MultiheadAttention.forward = _stock_forward
