"""torch.profiler: a call of attention is one entry of torch_ext's, of one name, in every mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torch_ext

pytestmark = pytest.mark.filterwarnings("ignore")


def entries(call) -> dict[str, int]:
    call()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    return {e.key: e.count for e in run.key_averages() if e.key.startswith("torch_ext::")}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_drop_in(mode, dropout_p):
    query = torch.randn(2, 4, 16, 8, requires_grad=mode is torch.enable_grad)

    def call():
        with mode():
            F.scaled_dot_product_attention(query, query, query, dropout_p=dropout_p)

    with torch_ext.enabled():
        assert entries(call) == {"torch_ext::attention_forward": 1}


def test_forward_and_backward():
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    with torch_ext.enabled():
        found = entries(
            lambda: F.scaled_dot_product_attention(query, query, query).sum().backward()
        )
    assert found == {"torch_ext::attention_forward": 1, "torch_ext::attention_backward": 1}


@pytest.mark.parametrize("training", [True, False])
def test_whole_layers(training):
    layer = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)

    def call():
        with torch.set_grad_enabled(training):
            layer(x, x, x, need_weights=False)

    with torch_ext.enabled():
        found = entries(call)
    assert found == {"torch_ext::self_attention": 1, "torch_ext::packed_attention_forward": 1}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_entries_show_shapes_and_link_to_the_backward_pass(mode):
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run, mode():
        out = torch_ext.scaled_dot_product_attention(query, query, query)
        if out.requires_grad:
            out.sum().backward()
    forward = next(e for e in run.events() if e.name == "torch_ext::attention_forward")
    assert forward.input_shapes[:3] == [[2, 4, 16, 8]] * 3
    nodes = [e.sequence_nr for e in run.events() if "AttentionFunction" in e.name]
    assert set(nodes) == ({forward.sequence_nr} if out.requires_grad else set())
