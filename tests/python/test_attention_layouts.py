"""Strides: what lies in memory is read where it lies, and gives what its contiguous copy gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import DTYPES, AttentionCase, AttentionTensors, check_case
from torch import Tensor

import torch_ext


def _packed(t: Tensor) -> Tensor:
    """A slice of a projection that holds three of them: (batch, length, 3, heads, dim)."""
    batch, heads, length, dim = t.shape
    packed = torch.full((batch, length, 3, heads, dim), torch.nan, dtype=t.dtype)
    packed[:, :, 1] = t.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _every_other(t: Tensor, dim: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] *= 2
    wide = torch.full(shape, torch.nan, dtype=t.dtype)
    index = [slice(None)] * t.dim()
    index[dim] = slice(None, None, 2)
    wide[tuple(index)] = t
    return wide[tuple(index)]


def _offset(t: Tensor) -> Tensor:
    """Storage offset of 1 element: aligned to nothing."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def _padded_rows(t: Tensor) -> Tensor:
    """Row stride that is odd, and rows that end in NaN."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed_heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "packed_projection": _packed,
    "transposed_rows": lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
    "batch_last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other_column": lambda t: _every_other(t, -1),
    "every_other_row": lambda t: _every_other(t, -2),
    "every_other_head": lambda t: _every_other(t, 1),
    "offset": _offset,
    "padded_rows": _padded_rows,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_heads": lambda t: t[:, :1].expand_as(t),
    "expanded_rows": lambda t: t[:, :, :1].expand_as(t),
    "expanded_columns": lambda t: t[..., :1].expand_as(t),
    "expanded_all": lambda t: t[:1, :1, :1, :1].expand_as(t),
}

CASES = [
    AttentionCase((2, 3, 37, 24), (2, 3, 70, 24), (2, 3, 70, 20), mask=(2, 3, 37, 70)),
    AttentionCase((2, 3, 1, 24), (2, 3, 70, 24), mask=(2, 3, 1, 70), mask_dtype=torch.bool),
    AttentionCase((2, 6, 37, 24), (2, 2, 40, 24), is_causal=True, enable_gqa=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs(layout: str, case: AttentionCase, dtype: torch.dtype) -> None:
    change = LAYOUTS[layout]

    def prepare(tensors: AttentionTensors) -> None:
        for name in ("query", "key", "value", "attn_mask"):
            tensor = getattr(tensors, name)
            if tensor is not None:
                changed = change(tensor.detach())
                assert "expanded" in layout or torch.equal(changed, tensor)
                setattr(tensors, name, changed.requires_grad_(tensor.requires_grad))

    check_case(case, dtype, prepare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_out(layout: str, case: AttentionCase, dtype: torch.dtype) -> None:
    """Bitwise what the contiguous gradient gives; sum() sends one of strides 0."""
    tensors = case.tensors(dtype)
    out, _ = torch.ops.torch_ext.attention_forward(*tensors.inputs, **case.options)
    grad_out = LAYOUTS[layout](torch.randn(out.shape).to(dtype))
    actual = torch.autograd.grad(out, tensors.differentiable, grad_out, retain_graph=True)
    expected = torch.autograd.grad(out, tensors.differentiable, grad_out.clone())
    for mine, plain in zip(actual, expected, strict=True):
        assert torch.equal(mine, plain)


def test_sum_and_ones() -> None:
    case = CASES[0]
    tensors = case.tensors(torch.float32)
    out, logsumexp = torch.ops.torch_ext.attention_forward(*tensors.inputs)
    summed = torch.autograd.grad(
        out.sum() + logsumexp.sum(), tensors.differentiable, retain_graph=True
    )
    ones = torch.autograd.grad(
        [out, logsumexp],
        tensors.differentiable,
        [torch.ones_like(out).contiguous(), torch.ones_like(logsumexp)],
    )
    for mine, plain in zip(summed, ones, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    """The order of every sum depends on shapes, not on strides."""
    tensors = CASES[0].tensors(dtype)
    strided = [
        LAYOUTS[layout](t.detach()).requires_grad_() for t in tensors.inputs if t is not None
    ]
    plain = [t.detach().clone(memory_format=torch.contiguous_format) for t in strided]
    plain = [t.requires_grad_() for t in plain]
    grad_out = torch.randn(2, 3, 37, 20).to(dtype)
    outs = [
        torch.ops.torch_ext.scaled_dot_product_attention(*inputs) for inputs in (strided, plain)
    ]
    assert torch.equal(*outs)
    grads = [
        torch.autograd.grad(out, inputs, grad_out)
        for out, inputs in zip(outs, (strided, plain), strict=True)
    ]
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("stride", [0, 2, 77], ids=str)
def test_key_padding_strides(stride: int) -> None:
    query, key, value = (torch.randn(2, 3, 70, 16) for _ in range(3))
    storage = torch.rand(400) < 0.3
    padding = storage.as_strided((2, 70), (80, 2) if stride == 77 else (70, stride))
    op = torch.ops.torch_ext.attention_forward
    actual = op(query, key, value, key_padding_mask=padding)
    expected = op(query, key, value, key_padding_mask=padding.contiguous())
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def _copies(run: Callable[[], object]) -> set[str]:
    """The operators that copy and that `run` calls, at any depth."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    copying = {"copy_", "clone", "contiguous", "cat", "repeat", "repeat_interleave", "_to_copy"}
    return {
        event.key
        for event in profile.key_averages()
        if event.key.startswith("aten::") and event.key.removeprefix("aten::") in copying
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout",
    ["transposed_heads", "packed_projection", "expanded_batch", "padded_rows", "every_other_head"],
)
def test_usual_layouts_are_not_copied(layout: str, dtype: torch.dtype) -> None:
    case = AttentionCase((2, 6, 37, 24), (2, 2, 40, 24), mask=(2, 6, 37, 40), enable_gqa=True)
    tensors = case.tensors(dtype)
    change = LAYOUTS[layout]
    query, key, value, mask = (change(t.detach()) for t in tensors.inputs if t is not None)
    inputs = [t.requires_grad_() for t in (query, key, value)]

    def run() -> None:
        out = torch.ops.torch_ext.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
        torch.autograd.grad(out.sum(), inputs)

    run()
    assert _copies(run) == set()


def test_masks_and_grouped_heads_take_no_memory() -> None:
    """No (q_len, kv_len) matrix, no repeated K and V, no written-out broadcast."""
    query = torch.randn(1, 8, 1024, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(2))
    mask = torch.randn(8, 1, 1024, requires_grad=True)
    op = torch.ops.torch_ext.scaled_dot_product_attention
    op(query, key, value, mask, enable_gqa=True).sum().backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        op(query, key, value, mask, enable_gqa=True).sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 8 * 1024 * 1024 * 4 / 4  # a quarter of one matrix of scores


def test_output_layout() -> None:
    """Query's memory order for every way in; test_attention_strides.py compares with stock."""
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    for op in (
        torch_ext.scaled_dot_product_attention,
        torch.ops.torch_ext.scaled_dot_product_attention,
        lambda *inputs: torch_ext.attention_forward(*inputs)[0],
        lambda *inputs: torch.ops.torch_ext.attention_forward(*inputs)[0],
    ):
        assert op(query, key, value).is_contiguous()
        assert op(query[0], key[0], value[0]).is_contiguous()
        assert op(query[None], key[None], value[None]).is_contiguous()
        heads_last = query.transpose(1, 2).contiguous().transpose(1, 2)
        assert op(heads_last, key, value).transpose(1, 2).is_contiguous()
    assert torch.ops.torch_ext.attention_forward(query, key, value)[1].is_contiguous()


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_written_whole(deterministic: bool) -> None:
    """Outputs are all written: fresh memory is filled with NaN under deterministic algorithms."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        for case in (
            *CASES,
            AttentionCase((2, 3, 5, 24), (2, 3, 70, 24), mask=(3, 1, 70)),
            AttentionCase((1, 3, 5, 24), (2, 1, 70, 24), is_causal=True, causal_offset=-3),
            AttentionCase((1, 2, 5, 8), (1, 2, 0, 8)),
        ):
            tensors = case.tensors(torch.float32)
            out, logsumexp = torch.ops.torch_ext.attention_forward(*tensors.inputs, **case.options)
            grads = torch.autograd.grad(out.sum(), tensors.differentiable)
            assert not any(t.isnan().any() for t in (out, logsumexp, *grads))
    finally:
        torch.use_deterministic_algorithms(False)
