"""torch.nn's attention modules compiled with the drop-in on: one graph, the stock results."""

from __future__ import annotations

import pytest
import torch
from rounding_bounds import assert_no_further
from stock_comparison import exact_outputs_and_gradients, outputs_and_gradients, ran_fused
from torch import nn

import torch_ext

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_off_afterwards")

BATCH, LENGTH, EMBED, HEADS = 2, 12, 32, 4


@pytest.fixture
def _off_afterwards():
    yield
    torch_ext.disable()


# Smooth: rounding switches a ReLU near 0 on or off, and with it a row of a gradient.
SMOOTH = {"dim_feedforward": 64, "dropout": 0.0, "activation": "gelu", "batch_first": True}


class SelfAttention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, dropout=dropout, batch_first=True)

    def forward(self, x, **masks):
        return self.attention(x, x, x, need_weights=False, **masks)[0] + x


def masks(kind: str) -> dict[str, torch.Tensor | bool]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5]])
    return {
        "none": {},
        "causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "additive padding": {
            "key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(padding, float("-inf"))
        },
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "additive padding", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention_in_one_graph(kind, training):
    layer = SelfAttention().train(training)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def call(module=layer):
        with torch.set_grad_enabled(training):
            return module(x, **masks(kind))

    def run(module):
        return outputs_and_gradients(layer, lambda: call(module), (x,))

    stock = run(layer)
    exact = exact_outputs_and_gradients(layer, call, (x,), stock)
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            assert_no_further(run(compiled), stock, exact)
            assert ran_fused() or not on


def test_multi_head_attention_with_inductor_trains_and_takes_changing_shapes():
    layer = SelfAttention()
    with torch_ext.enabled():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for batch, length in ((2, 12), (3, 17), (4, 9)):
            x = torch.randn(batch, length, EMBED, requires_grad=True)
            ours = outputs_and_gradients(layer, lambda x=x: compiled(x), (x,))
            assert ran_fused()
            with torch_ext.enabled(False):
                stock = outputs_and_gradients(layer, lambda x=x: layer(x), (x,))
            exact = exact_outputs_and_gradients(layer, lambda x=x: layer(x), (x,), stock)
            assert_no_further(ours, stock, exact)


def test_multi_head_attention_drops_weights_in_compiled_training():
    layer = SelfAttention(dropout=0.5)
    x = torch.randn(BATCH, LENGTH, EMBED)
    with torch_ext.enabled():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        first = compiled(x)
        assert ran_fused()
        torch.manual_seed(1)
        assert torch.equal(first, compiled(x))
        assert not torch.equal(first, compiled(x))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_encoder_with_inductor(mode):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **SMOOTH)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(mode == "train")
    x = torch.randn(BATCH, LENGTH, EMBED)
    padding = masks("padding")["key_padding_mask"]

    def call(module=encoder):
        with torch.set_grad_enabled(mode == "train"):
            return module(x, src_key_padding_mask=padding)

    def run(module):
        return outputs_and_gradients(encoder, lambda: call(module))

    stock = run(encoder)
    exact = exact_outputs_and_gradients(encoder, call, (), stock)
    with torch_ext.enabled():
        ours = run(torch.compile(encoder, fullgraph=True))
        assert ran_fused()
    assert_no_further(ours, stock, exact)


def test_decoder_layer_in_one_graph():
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, **SMOOTH)
    target, memory = torch.randn(BATCH, LENGTH, EMBED), torch.randn(BATCH, 7, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def call(module=layer):
        return module(target, memory, tgt_mask=mask, tgt_is_causal=True)

    def run(module):
        return outputs_and_gradients(layer, lambda: call(module))

    stock = run(layer)
    exact = exact_outputs_and_gradients(layer, call, (), stock)
    with torch_ext.enabled():
        ours = run(torch.compile(layer, backend="aot_eager", fullgraph=True))
        assert ran_fused()
    assert_no_further(ours, stock, exact)
