"""Graphs that other programs run: with the drop-in on they are stock's, and compute the same."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.nn.attention.bias import causal_lower_right

import torch_ext

BATCH, LENGTH, EMBED, HEADS = 2, 7, 16, 2

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=~pad[:, None, None])
        return out.transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.layer(x, x, x, key_padding_mask=pad, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=pad)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "multi-head, training": MultiHead,
    "multi-head": lambda: MultiHead().eval(),
    "encoder": lambda: Encoder().eval(),
}


@pytest.fixture(params=MODULES)
def module(request) -> nn.Module:
    torch.manual_seed(3)
    return MODULES[request.param]()


def inputs(batch: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, EMBED), torch.arange(length).expand(batch, -1) >= length - 2


def kinds(traced: torch.jit.ScriptModule) -> list[str]:
    return [node.kind() for node in traced.inlined_graph.nodes()]


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(module, grad):
    x, pad = inputs()
    with torch.set_grad_enabled(grad):
        expected = torch.jit.trace(module, (x, pad), check_trace=False)
        with torch_ext.enabled():
            # torch checks without grad, where its inference fast path is another graph.
            traced = torch.jit.trace(module, (x, pad), check_trace=not grad)
    assert kinds(traced) == kinds(expected)
    assert not [kind for kind in kinds(traced) if kind.startswith("torch_ext")]
    other = inputs(3, 11)
    assert_same_but_for_rounding(traced(*other), module(*other))


def test_jit_script(module):
    expected = torch.jit.script(module)
    with torch_ext.enabled():
        scripted = torch.jit.script(module)
    assert kinds(scripted) == kinds(expected)
    assert "torch_ext::" not in str(scripted.inlined_graph)


def test_a_trace_keeps_additive_padding_additive():
    layer = MultiHead()
    x, pad = inputs()
    with torch_ext.enabled(), torch.no_grad():
        zeros = torch.zeros(pad.shape).masked_fill(pad, float("-inf"))
        traced = torch.jit.trace(layer, (x, zeros))
    bias = torch.linspace(-2, 2, pad.numel()).view(pad.shape)
    assert_same_but_for_rounding(traced(x, bias), layer(x, bias))


def test_a_trace_of_a_causal_bias():
    def attention(query: Tensor, key: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, key, causal_lower_right(3, 5))

    arguments = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with torch_ext.enabled():
        traced = torch.jit.trace(attention, arguments)
    assert "torch_ext::" not in str(traced.graph)


def test_traces_load_without_torch_ext(tmp_path):
    torch.manual_seed(3)
    layer, arguments = MultiHead().eval(), inputs()
    with torch_ext.enabled(), torch.no_grad():
        torch.jit.trace(layer, arguments).save(tmp_path / "traced.pt")
    program = f"""
import sys, torch
traced = torch.jit.load({str(tmp_path / "traced.pt")!r})
traced(torch.ones(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool))
assert not any(name.startswith("torch_ext") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def exported(module: nn.Module, dynamo: bool) -> onnx.ModelProto:
    arguments = inputs()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        if dynamo:
            program = torch.onnx.export(module, arguments, dynamo=True, verbose=False)
            return program.model_proto
        buffer = io.BytesIO()
        training = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(module, arguments, buffer, dynamo=False, training=training)
    return onnx.load_from_string(buffer.getvalue())


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}" for node in model.graph.node)


@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [(Attention, True), (Encoder, True), (Attention, False), (MultiHead, False), (Encoder, False)],
)
def test_onnx(kind, dynamo):
    torch.manual_seed(3)
    # torch's exporter without Dynamo knows no operator of the inference fast path.
    module = kind().train(not dynamo)
    expected = exported(module, dynamo)
    with torch_ext.enabled():
        model = exported(module, dynamo)
    assert operators(model) == operators(expected)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x, pad = inputs()
    names = [value.name for value in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (x.numpy(), pad.numpy()), strict=True)))
    with torch_ext.enabled():
        assert_same_but_for_rounding(torch.from_numpy(np.asarray(out)), module(x, pad).detach())
        assert torch_ext.last_attention_path().startswith("cpu.")


def test_export_for_aotinductor_keeps_fused_attention():
    arguments = inputs()
    with torch.no_grad(), torch_ext.enabled():
        program = torch.export.export(MultiHead().eval(), arguments)
        graph, _ = aot_export_module(
            program.graph_module, tuple(program.parameters()) + arguments, trace_joint=False
        )
    names = [str(node.target) for node in graph.graph.nodes]
    assert any(name.startswith("torch_ext.") for name in names), names
