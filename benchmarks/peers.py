"""Who is measured: torch_ext and what PyTorch itself offers, all on the same tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Workload

import torch_ext

Call = Callable[[], object]


class Unsupported(Exception):
    """A peer has no way to do this workload; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one workload. ``leaves``: what gradients are taken of, in order."""

    workload: Workload
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    grad_out: Tensor
    module: nn.MultiheadAttention | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        if self.module is not None:
            return (self.query, *self.module.parameters())
        learned = (self.mask,) if self.mask is not None and self.mask.requires_grad else ()
        return (self.query, self.key, self.value, *learned)


def _mask(workload: Workload, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    w = workload
    if w.mask == "none":
        return None
    if w.mask == "half_padding":
        mask = torch.ones(w.batch, 1, 1, w.kv_len, dtype=torch.bool, device=device)
        mask[..., w.kv_len - w.kv_len // 2 :] = False
        return mask
    if w.mask == "sliding_window":
        distance = torch.arange(w.q_len, device=device)[:, None] - torch.arange(
            w.kv_len, device=device
        )
        return ((distance >= 0) & (distance < w.window))[None, None]
    mask = torch.randn(1, w.query_heads, w.q_len, w.kv_len, device=device).to(dtype)
    return mask.requires_grad_(w.mask == "additive_learned")


def make_inputs(
    workload: Workload, device: torch.device, dtype: torch.dtype | None = None
) -> Inputs:
    """Random inputs, the same ones at every call; ``dtype`` overrides the workload's."""
    w = workload
    torch.manual_seed(0)
    storage = getattr(torch, w.dtype)
    wanted = dtype or storage
    learning = w.measured == "forward_backward"

    def random(*shape: int) -> Tensor:
        # Rounded to the workload's own dtype first: every dtype then sees the same numbers.
        return torch.randn(*shape, device=device).to(storage).to(wanted)

    def heads(count: int, length: int) -> Tensor:
        if w.heads_last:
            return random(w.batch, length, count, w.head_dim).transpose(1, 2)
        return random(w.batch, count, length, w.head_dim)

    if w.operator == "self_attention":
        embed = w.query_heads * w.head_dim
        module = nn.MultiheadAttention(
            embed, w.query_heads, w.dropout, batch_first=True, device=device
        )
        module = module.to(storage).to(wanted).train(learning)
        x = random(w.batch, w.q_len, embed).requires_grad_(learning)
        grad_out = random(w.batch, w.q_len, embed)
        return Inputs(w, x, x, x, None, grad_out, module.requires_grad_(learning))
    query = heads(w.query_heads, w.q_len).requires_grad_(learning)
    key = heads(w.kv_heads, w.kv_len).requires_grad_(learning)
    value = heads(w.kv_heads, w.kv_len).requires_grad_(learning)
    mask = _mask(w, storage, device)
    if mask is not None and mask.is_floating_point() and wanted != storage:
        mask = mask.detach().to(wanted).requires_grad_(mask.requires_grad)
    grad_out = random(w.batch, w.query_heads, w.q_len, w.head_dim)
    return Inputs(w, query, key, value, mask, grad_out, None)


def _attention(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    w = inputs.workload
    return function(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.mask,
        dropout_p=w.dropout,
        is_causal=w.causal,
        enable_gqa=w.query_heads != w.kv_heads,
    )


def _torch_ext(inputs: Inputs) -> Callable[[], Tensor]:
    w, module = inputs.workload, inputs.module
    if module is None:
        return functools.partial(_attention, torch_ext.scaled_dot_product_attention, inputs)
    return lambda: torch_ext.self_attention(
        inputs.query,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
        w.query_heads,
        dropout_p=w.dropout,
        is_causal=w.causal,
    )


def _torch(inputs: Inputs) -> Callable[[], Tensor]:
    w, module = inputs.workload, inputs.module
    if module is None:
        return functools.partial(_attention, F.scaled_dot_product_attention, inputs)
    # The module asks for the mask even where is_causal says all about it.
    mask = None
    if w.causal:
        mask = nn.Transformer.generate_square_subsequent_mask(
            w.q_len, device=inputs.query.device, dtype=inputs.query.dtype
        )
    x = inputs.query
    return lambda: module(x, x, x, need_weights=False, attn_mask=mask, is_causal=w.causal)[0]


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w, device = inputs.workload, inputs.query.device
    if w.operator != "attention":
        raise Unsupported("has no projections")
    if w.dropout > 0:
        raise Unsupported("has no dropout")
    if device.type == "cpu" and w.measured != "forward":
        raise Unsupported("is inference only on the CPU")
    score_mod = None
    block_mask = None
    bias = inputs.mask
    if w.causal:
        block_mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, w.q_len, w.kv_len, device=device
        )
    elif w.mask == "half_padding":
        kept = w.kv_len - w.kv_len // 2
        block_mask = create_block_mask(
            lambda b, h, q, k: k < kept, None, None, w.q_len, w.kv_len, device=device
        )
    elif w.mask == "sliding_window":
        block_mask = create_block_mask(
            lambda b, h, q, k: (q >= k) & (q - k < w.window),
            None,
            None,
            w.q_len,
            w.kv_len,
            device=device,
        )
    elif bias is not None:

        def score_mod(score, b, h, q, k):  # type: ignore[no-untyped-def]
            return score + bias[0, h, q, k]

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        inputs.query,
        inputs.key,
        inputs.value,
        score_mod=score_mod,
        block_mask=block_mask,
        enable_gqa=w.query_heads != w.kv_heads,
    )


def _math(inputs: Inputs) -> Callable[[], Tensor]:
    forward = _torch(inputs)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return forward()

    return call


PEERS: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
    "torch": _torch,  # F.scaled_dot_product_attention, nn.MultiheadAttention
    "torch_ext": _torch_ext,
    "flex": _flex,  # torch.compile(flex_attention)
    "math": _math,  # torch's unfused formula
}


def forward_of(peer: str, inputs: Inputs) -> Callable[[], Tensor]:
    """The forward call of a peer; raises Unsupported."""
    return PEERS[peer](inputs)


def call_of(peer: str, inputs: Inputs) -> Call:
    """What is timed: the forward pass without autograd, or forward and backward."""
    forward = forward_of(peer, inputs)
    if inputs.workload.measured == "forward":

        def call() -> object:
            with torch.no_grad():
                return forward()

        return call
    leaves = inputs.leaves
    return lambda: torch.autograd.grad(forward(), leaves, inputs.grad_out)


def results_of(peer: str, inputs: Inputs) -> list[Tensor]:
    """The output and, where the workload has a backward pass, the gradients of all leaves."""
    forward = forward_of(peer, inputs)
    learning = inputs.workload.measured == "forward_backward"
    with contextlib.nullcontext() if learning else torch.no_grad():
        out = forward()
    if not learning:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]


def reference_of(workload: Workload, device: torch.device) -> list[Tensor]:
    """The same in float64, by torch's plain formula."""
    return results_of("math", make_inputs(workload, device, torch.float64))
