"""Attention through operators and switch on every device that has kernels: each feature once.

The CPU's own tests go into each of them at length, and tests/kernels do so for every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, AttentionCase, AttentionTensors, check_case
from attention_reference import attention, relative_error
from rounding_bounds import assert_same_but_for_rounding, same_but_for_rounding
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_ext

pytestmark = pytest.mark.usefixtures("device")

CASES = [
    AttentionCase((2, 4, 70, 64), (2, 4, 130, 64)),
    AttentionCase((2, 4, 130, 128), (2, 2, 130, 128), is_causal=True, enable_gqa=True),
    AttentionCase((2, 2, 33, 160), (2, 2, 70, 160), is_causal=True, causal_offset=37),
    AttentionCase((3, 8, 1, 64), (3, 2, 700, 64), enable_gqa=True),
    AttentionCase((2, 3, 40, 24), (2, 3, 90, 24), (2, 3, 90, 72), scale=0.4),
    AttentionCase((2, 3, 70, 64), (2, 3, 90, 64), mask=(3, 70, 90)),
    AttentionCase((2, 3, 70, 64), (2, 3, 90, 64), mask=(2, 1, 1, 90), mask_dtype=torch.bool),
    AttentionCase((2, 3, 70, 40), (2, 3, 90, 40), padding=(2, 90)),
    AttentionCase((40, 32), (50, 32)),
    AttentionCase((2, 3, 20, 300), (2, 3, 30, 300)),
]


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    torch_ext.disable()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms(case: AttentionCase, dtype: torch.dtype) -> None:
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    def prepare(tensors: AttentionTensors) -> None:
        for name in ("query", "key", "value"):
            apart = getattr(tensors, name).detach().transpose(-3, -2).contiguous()
            setattr(tensors, name, apart.transpose(-3, -2).requires_grad_())
        last = tensors.value.detach().transpose(-2, -1).contiguous()
        tensors.value = last.transpose(-2, -1).requires_grad_()

    check_case(AttentionCase((2, 3, 70, 64), (2, 3, 90, 64)), dtype, prepare)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_broadcast_operands(dtype: torch.dtype) -> None:
    """They are summed in fp32 and rounded once: the kernels write them as fp32."""
    check_case(AttentionCase((3, 4, 33, 64), (1, 4, 70, 64)), dtype)
    check_case(AttentionCase((1, 1, 33, 264), (2, 3, 40, 264)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_mask_that_the_seed_stands_for(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 70, 64).to(dtype).requires_grad_() for _ in range(3))
    seed = torch.tensor(1234)
    out, _ = torch.ops.torch_ext.attention_forward(query, key, value, None, 0.25, dropout_seed=seed)
    keep = torch.ops.torch_ext.attention_dropout_mask(seed, 0.25, (2, 3, 70, 70))
    assert 0.7 < keep.double().mean() < 0.8
    expected, _ = attention(query, key, value, dropout_p=0.25, keep=keep)
    grad = torch.randn(2, 3, 70, 64).to(dtype)
    actual_grads = torch.autograd.grad(out, (query, key, value), grad)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad.double())
    assert_same_but_for_rounding([out, *actual_grads], [expected, *expected_grads])


def test_dropout_follows_the_generator_of_the_device() -> None:
    tensors = [torch.randn(2, 3, 70, 64) for _ in range(3)]

    def call() -> Tensor:
        return torch_ext.scaled_dot_product_attention(*tensors, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_backward(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 3, 300, 64).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(2, 3, 300, 64).to(dtype)

    def gradients() -> tuple[Tensor, ...]:
        out = torch_ext.scaled_dot_product_attention(*tensors, is_causal=True)
        return torch.autograd.grad(out, tensors, grad)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(3):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.use_deterministic_algorithms(before)


def test_second_derivatives() -> None:
    tensors = [torch.randn(1, 2, 5, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradgradcheck(torch_ext.scaled_dot_product_attention, tensors)


def test_autocast(device: str) -> None:
    query, key, value = (torch.randn(2, 3, 70, 64) for _ in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = torch_ext.scaled_dot_product_attention(query, key, value)
    assert out.dtype == torch.bfloat16
    expected, _ = attention(query, key, value)
    assert_same_but_for_rounding(out, expected)


def test_the_switch_catches_the_device(device: str) -> None:
    tensors = [torch.randn(2, 3, 70, 64) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*tensors)
    with torch_ext.enabled(cuda=True):
        out = F.scaled_dot_product_attention(*tensors)
        assert torch_ext.last_attention_path().startswith(f"{device}.")
    assert_same_but_for_rounding(out, expected)


def test_a_backend_chosen_by_name_stays_torchs(device: str) -> None:
    tensors = [torch.randn(2, 3, 70, 64) for _ in range(3)]
    with torch_ext.enabled(cuda=True), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*tensors)
        assert not torch_ext.last_attention_path().startswith(f"{device}.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers(device: str, dtype: torch.dtype) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(device, dtype)
    x = torch.randn(2, 33, 64).to(dtype)
    padding = torch.zeros(2, 33, dtype=torch.bool)
    padding[1, 20:] = True
    expected = layer(x, src_key_padding_mask=padding)
    with torch_ext.enabled(cuda=True):
        out = layer(x, src_key_padding_mask=padding)
    kept = ~padding
    assert_same_but_for_rounding(out[kept], expected[kept])


def test_fp32_is_exact_unless_torchs_switch_allows_tf32(device: str) -> None:
    query, key, value = (torch.randn(2, 3, 130, 64) for _ in range(3))
    expected, _ = attention(query, key, value)
    assert_same_but_for_rounding(
        torch_ext.scaled_dot_product_attention(query, key, value), expected
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        out = torch_ext.scaled_dot_product_attention(query, key, value)
    finally:
        torch.set_float32_matmul_precision(before)
    error = relative_error(out, expected)
    assert error < (2e-3 if device == "cuda" else same_but_for_rounding(torch.float32))
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        assert error > 1e-5
        assert torch_ext.last_attention_path() == "cuda.tf32_tile"


def test_tensors_on_two_devices_are_refused() -> None:
    query, value = (torch.randn(2, 3, 7, 8) for _ in range(2))
    elsewhere = torch.empty(2, 3, 7, 8, device="meta")
    with pytest.raises(RuntimeError, match="key"):
        torch.ops.torch_ext.attention_forward(query, elsewhere, value)
