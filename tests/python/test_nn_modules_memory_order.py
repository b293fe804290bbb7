"""nn.MultiheadAttention's output lies in memory as stock's.

Dropout draws its numbers in the order of memory: the layers behind attention drop what they drop in
stock, and in scripted modules.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import torch_ext

BATCH, LENGTH, EMBED, HEADS = 3, 6, 16, 4


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


def random_numbers_after(call) -> tuple[Tensor, float]:
    torch.manual_seed(42)
    out = call()
    return out.detach(), torch.rand(1).item()


@pytest.mark.parametrize("heads", [4, 1])  # an odd number keeps torch from its fast path
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_strides_as_stock(batch_first, heads, bias):
    layer = nn.MultiheadAttention(EMBED, heads, batch_first=batch_first, bias=bias)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    x = torch.randn(BATCH, LENGTH, EMBED) if batch_first else torch.randn(LENGTH, BATCH, EMBED)
    for training, grad, masked, autocast, source in itertools.product(
        (True, False), (True, False), (None, mask, mask.float()), (True, False),
        (x, x[:, :1], x[0]),
    ):  # fmt: skip
        layer.train(training)
        length = source.size(-2) if batch_first or source.dim() == 2 else source.size(0)
        attn_mask = None if masked is None else masked[:length, :length]
        strides, dtypes = [], []
        for on in (False, True):
            with (
                torch_ext.enabled(on),
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast and training),
            ):
                out = layer(source, source, source, attn_mask=attn_mask, need_weights=False)[0]
            strides.append(out.stride())
            dtypes.append(out.dtype)
        where = training, grad, None if masked is None else masked.dtype, autocast, source.shape
        assert strides[1] == strides[0], where
        assert dtypes[1] == dtypes[0], where


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_scripted_and_eager_layers_agree_under_one_seed(attention_dropout, masked, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, dropout=0.2)
    layer.self_attn.dropout = attention_dropout
    x = torch.randn(BATCH, LENGTH, EMBED)
    options = {"src_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.bool)} if masked else {}
    torch_ext.enable()
    scripted = torch.jit.script(layer)
    with torch.set_grad_enabled(grad):
        for _ in range(3):  # interpreted, profiled, optimised
            eager, after_eager = random_numbers_after(lambda: layer(x, **options))
            other, after_other = random_numbers_after(lambda: scripted(x, **options))
            torch.testing.assert_close(other, eager)
            assert after_other == after_eager


def test_layers_behind_attention_drop_what_they_drop_in_stock():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, dropout=0.2)
    layer.self_attn.dropout = 0.0  # its numbers are another generator's
    x = torch.randn(BATCH, LENGTH, EMBED)
    stock, after_stock = random_numbers_after(lambda: layer(x))
    torch_ext.enable()
    ours, after_ours = random_numbers_after(lambda: layer(x))
    torch.testing.assert_close(ours, stock)
    assert after_ours == after_stock
