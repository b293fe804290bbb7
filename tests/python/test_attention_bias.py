"""torch.nn.attention.bias under the drop-in and in torch_ext.scaled_dot_product_attention."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ext

SHAPES = [(6, 6), (5, 12), (1, 9), (12, 5)]
BIASES = {"lower right": causal_lower_right, "upper left": causal_upper_left}


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


class Masks(TorchDispatchMode):
    """Counts the masks written out inside."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.written += func.name().startswith("aten::tril")
        return func(*args, **(kwargs or {}))


def make(bias: str, q_len: int, kv_len: int) -> CausalBias:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lower right causal bias will produce NaNs")
        return BIASES[bias](q_len, kv_len)


def inputs(q_len: int, kv_len: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(2, 4, q_len, 16, dtype=dtype, requires_grad=True),
        torch.randn(2, 2, kv_len, 16, dtype=dtype, requires_grad=True),
        torch.randn(2, 2, kv_len, 8, dtype=dtype, requires_grad=True),
    ]


def reference(bias: str, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    q_len, kv_len = query.size(-2), key.size(-2)
    diagonal = kv_len - q_len if bias == "lower right" else 0
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal)
    out = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, **options)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def ran_fused() -> bool:
    return torch_ext.last_attention_path().startswith("cpu.")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("way", ["drop-in", "function"])
def test_fused_without_a_mask_in_memory(bias, q_len, kv_len, way):
    arguments = inputs(q_len, kv_len)
    causal = make(bias, q_len, kv_len)
    expected = reference(bias, *arguments)
    with torch_ext.enabled(way == "drop-in"), Masks() as masks:
        function = (
            F.scaled_dot_product_attention
            if way == "drop-in"
            else torch_ext.scaled_dot_product_attention
        )
        out = function(*arguments, attn_mask=causal, enable_gqa=True)
    assert ran_fused()
    assert masks.written == 0
    assert_same_but_for_rounding(out, expected)
    grad_out = torch.randn_like(out)
    ours = torch.autograd.grad(out, arguments, grad_out)
    if q_len > kv_len and bias == "lower right":
        assert all(torch.isfinite(grad).all() for grad in ours)
        return  # stock gradients are NaN where a query has no key
    assert_same_but_for_rounding(ours, torch.autograd.grad(expected, arguments, grad_out))


def test_options_go_through():
    query, key, value = (t.detach() for t in inputs(5, 12))
    bias = causal_lower_right(5, 12)
    with torch_ext.enabled():
        scaled = F.scaled_dot_product_attention(query, key, value, bias, scale=0.3, enable_gqa=True)
        torch.manual_seed(1)
        first = F.scaled_dot_product_attention(query, key, value, bias, 0.5, enable_gqa=True)
        torch.manual_seed(1)
        again = torch_ext.scaled_dot_product_attention(
            query, key, value, bias, 0.5, enable_gqa=True
        )
        with pytest.raises(ValueError, match="causal"):
            F.scaled_dot_product_attention(query, key, value, bias, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            low = F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)
            assert ran_fused()
    expected = reference("lower right", query, key, value, scale=0.3)
    assert_same_but_for_rounding(scaled, expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, reference("lower right", query, key, value))
    assert low.dtype == torch.bfloat16
    assert_same_but_for_rounding(low, reference("lower right", query, key, value))


@pytest.mark.parametrize("bias", BIASES)
def test_compiled(bias, fresh_dynamo):
    def attention(query: Tensor, key: Tensor, value: Tensor, causal: CausalBias) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, causal, enable_gqa=True) * 2

    arguments = inputs(5, 12)
    causal = make(bias, 5, 12)
    expected = reference(bias, *arguments) * 2
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            out = compiled(*arguments, causal)
            assert_same_but_for_rounding(out, expected)
            assert ran_fused() or not on
    grad_out = torch.randn_like(out)
    assert_same_but_for_rounding(
        torch.autograd.grad(out, arguments, grad_out),
        torch.autograd.grad(expected, arguments, grad_out),
    )


def test_sdpa_kernel_keeps_torchs_way():
    arguments = inputs(5, 12)
    bias = causal_lower_right(5, 12)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*arguments, bias, enable_gqa=True)
        with torch_ext.enabled():
            out = F.scaled_dot_product_attention(*arguments, bias, enable_gqa=True)
            assert not ran_fused()
    assert torch.equal(out, expected)


def test_lengths_that_do_not_fit_fail():
    query, key, value = inputs(5, 12)
    with torch_ext.enabled(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(
            query, key, value, causal_lower_right(4, 12), enable_gqa=True
        )
    with pytest.raises(
        ValueError, match=r"takes a causal_lower_right .* \(5, 12\), got .*\(4, 12\)"
    ):
        torch_ext.scaled_dot_product_attention(
            query, key, value, causal_lower_right(4, 12), enable_gqa=True
        )


def test_the_class_is_given_back_and_a_late_import_is_seen():
    before = dict(vars(CausalBias))
    with torch_ext.enabled():
        assert CausalBias._dispatch is not before["_dispatch"].__func__
    assert dict(vars(CausalBias)) == before

    program = """
import sys, torch, torch_ext
import torch.utils.flop_counter  # no longer waited for
finders = list(sys.meta_path)
torch_ext.enable()
assert "torch.nn.attention.bias" not in sys.modules
from torch.nn.attention.bias import CausalBias, causal_lower_right
assert CausalBias._dispatch.__module__.startswith("torch_ext")
q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 4, 8)
torch.nn.functional.scaled_dot_product_attention(q, k, k, causal_lower_right(2, 4))
assert torch_ext.last_attention_path().startswith("cpu.")
torch_ext.disable()
assert CausalBias._dispatch.__module__ == "torch.nn.attention.bias"
assert sys.meta_path == finders
"""
    subprocess.run([sys.executable, "-c", program], check=True)
