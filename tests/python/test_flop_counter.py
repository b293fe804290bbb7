"""FlopCounterMode: torch_ext's operators count what torch counts for the same work."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_ext

BATCH, HEADS, Q_LEN, KV_LEN, HEAD_DIM = 2, 4, 6, 10, 8
EMBED = HEADS * HEAD_DIM


def counted(call, on: bool | None = None) -> int:
    with FlopCounterMode(display=False) as counter:
        if on is None:
            call()
        else:
            with torch_ext.enabled(on):
                call()
    return counter.get_total_flops()


def qkv(*, grad: bool, kv_heads: int = HEADS) -> list[torch.Tensor]:
    return [
        torch.randn(BATCH, heads, length, HEAD_DIM, requires_grad=grad)
        for heads, length in ((HEADS, Q_LEN), (kv_heads, KV_LEN), (kv_heads, KV_LEN))
    ]


FORWARD = 2 * 2 * BATCH * HEADS * Q_LEN * KV_LEN * HEAD_DIM


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
@pytest.mark.parametrize("grad", [True, False])
def test_dropin_counts_as_stock(grad, options):
    inputs = qkv(grad=grad)

    def call():
        out = F.scaled_dot_product_attention(*inputs, **options)
        if grad:
            out.sum().backward()

    stock = counted(call, on=False)
    assert stock == FORWARD * (7 if grad else 2) // 2
    assert counted(call, on=True) == stock


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode):
    with mode():
        inputs = qkv(grad=False)
        assert counted(lambda: F.scaled_dot_product_attention(*inputs), on=True) == FORWARD
        assert counted(lambda: torch_ext.scaled_dot_product_attention(*inputs)) == FORWARD


def test_operators_called_by_name():
    inputs = qkv(grad=True)
    ops = torch.ops.torch_ext

    def call():
        ops.scaled_dot_product_attention(*inputs).sum().backward()

    assert counted(call) == FORWARD * 7 // 2
    out, logsumexp = ops.attention_forward(*inputs)
    assert counted(lambda: ops.attention_forward(*inputs)) == FORWARD
    with torch.no_grad():
        backward = counted(
            lambda: ops.attention_backward(torch.ones_like(out), None, *inputs, out, logsumexp)
        )
    assert backward == FORWARD * 5 // 2


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_count_each_query_head(kv_heads):
    inputs = qkv(grad=False, kv_heads=kv_heads)
    assert counted(lambda: torch_ext.attention_forward(*inputs, enable_gqa=True)) == FORWARD


def test_masks_and_broadcast_dimensions():
    query = torch.randn(Q_LEN, HEAD_DIM)
    _, key, _ = qkv(grad=False)
    value = torch.randn(BATCH, HEADS, KV_LEN, 3)
    mask = torch.randn(Q_LEN, KV_LEN, requires_grad=True)
    rows = BATCH * HEADS * Q_LEN

    def call():
        torch_ext.scaled_dot_product_attention(query, key, value, mask).sum().backward()

    forward = 2 * rows * KV_LEN * (HEAD_DIM + 3)
    assert counted(call) == forward + 2 * rows * KV_LEN * (3 * HEAD_DIM + 2 * 3)


@pytest.mark.parametrize("kind", ["multi-head", "encoder layer", "decoder layer"])
def test_training_modules_count_as_stock(kind):
    x = torch.randn(BATCH, Q_LEN, EMBED, requires_grad=True)
    options = {"dropout": 0.0, "batch_first": True}
    if kind == "multi-head":
        layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)

        def call():
            layer(x, x, x, need_weights=False)[0].sum().backward()

    elif kind == "encoder layer":
        encoder = nn.TransformerEncoderLayer(EMBED, HEADS, 48, **options)

        def call():
            encoder(x).sum().backward()

    else:
        decoder = nn.TransformerDecoderLayer(EMBED, HEADS, 48, **options)

        def call():
            decoder(x, x).sum().backward()

    assert counted(call, on=True) == counted(call, on=False)


def test_self_attention_in_inference_counts_its_products():
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, Q_LEN, EMBED)
    attention = 2 * 2 * BATCH * HEADS * Q_LEN * Q_LEN * HEAD_DIM
    projections = 2 * BATCH * Q_LEN * EMBED * 4 * EMBED
    with torch.no_grad():
        total = counted(lambda: layer(x, x, x, need_weights=False), on=True)
    assert total == attention + projections


def test_weight_gradients():
    tokens, rows, columns = 7, 5, 3
    grad_output, source = torch.randn(2, tokens, rows), torch.randn(2, tokens, columns)
    weight_grad, bias_grad = torch.zeros(rows, columns), torch.zeros(rows)
    flops = counted(
        lambda: torch.ops.torch_ext.linear_wgrad_(weight_grad, bias_grad, grad_output, source)
    )
    assert flops == 2 * 2 * tokens * rows * columns
    indices = torch.zeros(2, tokens, dtype=torch.int64)
    table = torch.zeros(9, rows)
    assert counted(lambda: torch.ops.torch_ext.embedding_wgrad_(table, indices, grad_output)) == 0


@pytest.mark.parametrize("first", ["torch_ext", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first):
    second = ({"torch_ext", "torch.utils.flop_counter"} - {first}).pop()
    program = f"""
import sys, torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == (first_is_counter := {first!r} != "torch_ext")
import {second}
from torch.utils.flop_counter import FlopCounterMode
import torch_ext
q = torch.randn(1, 1, 4, 4)
with FlopCounterMode(display=False) as counter:
    torch_ext.attention_forward(q, q, q)
assert counter.get_total_flops() == 4 * 4 * 4 * 4, counter.get_flop_counts()
assert not [f for f in sys.meta_path if type(f).__module__.startswith("torch_ext")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
