"""is_causal in the nn modules is a hint about the mask: stock's results, also where it is wrong.

torch believes the hint in some paths and reads the mask in others. Over the whole grid of masks,
padding and modes the drop-in gives stock's values, and stock's errors. In float64: rounding is far
below anything that a mask could do.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext

BATCH, LENGTH, SOURCE, EMBED, HEADS = 2, 6, 5, 16, 2
TOLERANCE = 1e-9
OPTIONS = {"dropout": 0.0, "activation": "gelu"}


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(before)


def causal(q_len: int = LENGTH, kv_len: int = LENGTH) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).triu(1)


def stripes(*sizes: int) -> Tensor:
    """Not causal, and leaves every query its first key."""
    numel = torch.Size(sizes).numel()
    return (torch.arange(numel) % 3 == 1).view(sizes) & (torch.arange(sizes[-1]) > 0)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


def masks(q_len: int = LENGTH, kv_len: int = LENGTH) -> dict[str, Tensor | None]:
    boolean = {
        "causal": causal(q_len, kv_len),
        "other": stripes(q_len, kv_len),
        "causal and more": causal(q_len, kv_len) | stripes(q_len, kv_len),
        "per head": stripes(BATCH * HEADS, q_len, kv_len),
    }
    return {
        "none": None,
        **boolean,
        **{f"additive {name}": additive(mask) for name, mask in boolean.items()},
        # Not 0 is "ignore" in torch's fast path of nn.TransformerEncoderLayer: a key is left.
        "bias": torch.linspace(-2, 2, q_len * kv_len).view(q_len, kv_len)
        * (torch.arange(kv_len) > 0),
    }


def padding(like: Tensor | None, kv_len: int = LENGTH) -> Tensor:
    mask = torch.arange(kv_len) >= torch.tensor([[kv_len], [3]])
    return additive(mask) if like is not None and like.is_floating_point() else mask


def results(call: Callable[[], Tensor], module: nn.Module) -> list[Tensor] | str:
    """The output and the parameters' gradients, or the error."""
    module.zero_grad(set_to_none=True)
    try:
        out = call()
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    found = [out.detach()]
    if out.requires_grad:
        out.square().sum().backward()
        found += [p.grad for p in module.parameters() if p.grad is not None]
    return found


def compare(call: Callable[[], Tensor], module: nn.Module, where: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = results(call, module)
        with torch_ext.enabled():
            ours = results(call, module)
    if isinstance(stock, str) or isinstance(ours, str):
        assert ours == stock, where
        return
    assert len(ours) == len(stock), where
    for mine, theirs in zip(ours, stock, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert (mine - theirs).abs().max().item() <= TOLERANCE * scale, where


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_self_attention(batch_first, need_weights):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    x = torch.randn(BATCH, LENGTH, EMBED) if batch_first else torch.randn(LENGTH, BATCH, EMBED)
    for (name, mask), hint, padded, training, grad in itertools.product(
        masks().items(), *[(True, False)] * 4
    ):
        layer.train(training)

        def call(mask=mask, hint=hint, padded=padded, grad=grad):
            with torch.set_grad_enabled(grad):
                return layer(
                    x, x, x, attn_mask=mask, is_causal=hint, need_weights=need_weights,
                    key_padding_mask=padding(mask) if padded else None,
                )[0]  # fmt: skip

        compare(call, layer, (name, hint, padded, training, grad))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_cross_attention(batch_first):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    query, memory = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, SOURCE, EMBED)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    for (name, mask), hint, padded, training in itertools.product(
        masks(LENGTH, SOURCE).items(), *[(True, False)] * 3
    ):
        layer.train(training)

        def call(mask=mask, hint=hint, padded=padded):
            return layer(
                query, memory, memory, attn_mask=mask, is_causal=hint, need_weights=False,
                key_padding_mask=padding(mask, SOURCE) if padded else None,
            )[0]  # fmt: skip

        compare(call, layer, (name, hint, padded, training))


@pytest.mark.parametrize("frozen", [True, False])
def test_unbatched_and_frozen(frozen):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True).requires_grad_(not frozen)
    for x, requires_grad, hint, training in itertools.product(
        (torch.randn(LENGTH, EMBED), torch.randn(1, LENGTH, EMBED)), *[(True, False)] * 3
    ):
        x = x.clone().requires_grad_(requires_grad)
        layer.train(training)
        for mask in (causal(), stripes(LENGTH, LENGTH), additive(stripes(LENGTH, LENGTH))):

            def call(x=x, mask=mask, hint=hint):
                return layer(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0]

            compare(call, layer, (x.dim(), requires_grad, hint, training))


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer(batch_first):
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, **OPTIONS, batch_first=batch_first)
    x = torch.randn(BATCH, LENGTH, EMBED) if batch_first else torch.randn(LENGTH, BATCH, EMBED)
    for (name, mask), hint, padded, training, grad in itertools.product(
        masks().items(), *[(True, False)] * 4
    ):
        layer.train(training)

        def call(mask=mask, hint=hint, padded=padded, grad=grad):
            pad = padding(mask) if padded else None
            with torch.set_grad_enabled(grad):
                return layer(x, src_mask=mask, src_key_padding_mask=pad, is_causal=hint)

        compare(call, layer, (name, hint, padded, training, grad))


@pytest.mark.parametrize("nested", [True, False])
def test_encoder(nested):
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, **OPTIONS, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    x = torch.randn(BATCH, LENGTH, EMBED)
    real = ~padding(None)
    for (name, mask), hint, padded, training, grad in itertools.product(
        masks().items(), (None, True, False), *[(True, False)] * 3
    ):
        encoder.train(training)

        def call(mask=mask, hint=hint, padded=padded, grad=grad):
            pad = padding(mask) if padded else None
            with torch.set_grad_enabled(grad):
                out = encoder(x, mask=mask, src_key_padding_mask=pad, is_causal=hint)
            return out[real] if padded else out

        compare(call, encoder, (name, hint, padded, training, grad))


@pytest.mark.parametrize("training", [True, False])
def test_decoder(training):
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 32, **OPTIONS, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).train(training)
    target, memory = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, SOURCE, EMBED)
    memory_masks = masks(LENGTH, SOURCE)
    for (name, mask), hint, memory_hint, padded in itertools.product(
        masks().items(), (None, True, False), *[(True, False)] * 2
    ):
        memory_mask = memory_masks[name]

        def call(mask=mask, memory_mask=memory_mask, hints=(hint, memory_hint), padded=padded):
            return decoder(
                target,
                memory,
                tgt_mask=mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=padding(mask) if padded else None,
                memory_key_padding_mask=padding(memory_mask, SOURCE) if padded else None,
                tgt_is_causal=hints[0],
                memory_is_causal=hints[1],
            )

        compare(call, decoder, (name, hint, memory_hint, padded))


def test_compiled(fresh_dynamo):
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    for mask, padded, training in itertools.product(
        (causal(), additive(stripes(LENGTH, LENGTH))), (True, False), (True, False)
    ):
        layer.train(training)
        pad = padding(mask) if padded else None

        def call(mask=mask, pad=pad):
            return layer(
                x, x, x, attn_mask=mask, key_padding_mask=pad, is_causal=True, need_weights=False
            )[0]

        expected = call()
        with torch_ext.enabled():
            out = torch.compile(call, backend="eager")()
        torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0.0)
