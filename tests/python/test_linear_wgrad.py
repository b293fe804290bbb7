"""linear_wgrad_: a linear layer's weight and bias gradients, accumulated in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accumulation_cases import DTYPE_TRIPLES, DTYPES, OPS, dtype_id, layouts, nonzero, read_layouts
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor

pytestmark = pytest.mark.usefixtures("device")


def check(
    weight: Tensor, bias: Tensor | None, grad: Tensor, value: Tensor, beta: float = 1.0
) -> None:
    tokens = grad.double().reshape(grad.shape[:-1].numel(), grad.shape[-1])
    expected = tokens.t() @ value.double().reshape(len(tokens), value.shape[-1])
    of_bias = tokens.sum(0)
    if beta != 0:
        expected += beta * weight.double()
        if bias is not None:
            of_bias += beta * bias.double()
    pointer = weight.data_ptr()
    assert OPS.linear_wgrad_(weight, bias, grad, value, beta=beta) is None
    assert weight.data_ptr() == pointer
    is_double = torch.float64 in (weight.dtype, grad.dtype, value.dtype)
    eps = torch.finfo(torch.float64 if is_double else torch.float32).eps
    for actual, wanted in ((weight, expected), (bias, of_bias)):
        if actual is None:
            continue
        torch.testing.assert_close(
            actual.double(),
            wanted,
            rtol=torch.finfo(actual.dtype).eps,
            atol=max(16 * (len(tokens) + 1) * eps, torch.finfo(actual.dtype).smallest_normal),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sizes_around_every_tile(dtype: torch.dtype, cpu_capability: str) -> None:
    weight_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    for tokens in (1, 2, 5):
        for out_features in (1, 3, 4, 8, 15, 17, 33):
            for in_features in (1, 2, 15, 16, 17, 31, 32, 33, 70):
                grad = nonzero(tokens, out_features, dtype=dtype)
                value = nonzero(tokens, in_features, dtype=dtype)
                weight = nonzero(out_features, in_features, dtype=weight_dtype)
                check(weight, nonzero(out_features, dtype=weight_dtype), grad, value)
                check(weight.fill_(float("nan")), None, grad, value, beta=0.0)


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES, ids=dtype_id)
def test_every_mix_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    weight_dtype, grad_dtype, input_dtype = dtypes
    for beta in (1.0, 0.0, 0.5):
        check(
            nonzero(19, 45, dtype=weight_dtype),
            nonzero(19, dtype=weight_dtype),
            nonzero(3, 4, 19, dtype=grad_dtype),
            nonzero(3, 4, 45, dtype=input_dtype),
            beta,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strides(dtype: torch.dtype) -> None:
    weight_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    for grad in read_layouts(6, 21, dtype).values():
        for value in read_layouts(6, 37, dtype).values():
            check(nonzero(21, 37, dtype=weight_dtype), nonzero(21), grad, value)
    grad, value = nonzero(6, 21, dtype=dtype), nonzero(6, 37, dtype=dtype)
    for beta in (1.0, 0.0, 2.0):
        for weight in layouts(21, 37, weight_dtype).values():
            check(weight, nonzero(42)[::2], grad, value, beta)


def test_tokens_of_any_number_of_dimensions() -> None:
    for shape in ((), (3,), (2, 3), (2, 1, 3, 2)):
        check(nonzero(5, 7), nonzero(5), nonzero(*shape, 5), nonzero(*shape, 7))
    # No strides say (tokens, features) of these: read all the same.
    grad, value = nonzero(4, 3, 5).transpose(0, 1), nonzero(4, 3, 7).transpose(0, 1)
    check(nonzero(5, 7), nonzero(5), grad, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_more_tokens_than_one_panel(dtype: torch.dtype) -> None:
    for tokens in (255, 256, 257, 1000):
        check(
            nonzero(65, 130),
            nonzero(65),
            nonzero(tokens, 65, dtype=dtype),
            nonzero(tokens, 130, dtype=dtype),
        )


def test_layers_of_a_model_sum_as_one_large_batch() -> None:
    """Four micro-batches of bf16 into fp32, against one product in float64."""
    weight, bias = torch.empty(96, 200), torch.empty(96)
    grads, inputs = nonzero(40, 96, dtype=torch.bfloat16), nonzero(40, 200, dtype=torch.bfloat16)
    for step in range(4):
        part = slice(10 * step, 10 * step + 10)
        OPS.linear_wgrad_(weight, bias, grads[part], inputs[part], beta=float(step > 0))
    assert_same_but_for_rounding(
        [weight, bias], [grads.double().t() @ inputs.double(), grads.double().sum(0)]
    )


def test_agrees_with_autograd() -> None:
    layer = torch.nn.Linear(30, 20)
    value = torch.randn(4, 6, 30)
    out = F.linear(value, layer.weight, layer.bias)
    grad = torch.randn_like(out)
    out.backward(grad)
    weight, bias = torch.zeros(20, 30), torch.zeros(20)
    OPS.linear_wgrad_(weight, bias, grad, value)
    assert_same_but_for_rounding([weight, bias], [layer.weight.grad, layer.bias.grad])


def test_256_plus_1_minus_256(cpu_capability: str) -> None:
    for in_features in (1, 17, 64):
        weight, bias = torch.empty(3, in_features), torch.empty(3)
        value = torch.ones(1, in_features, dtype=torch.bfloat16)
        for beta, number in ((0.0, 256.0), (1.0, 1.0), (1.0, -256.0)):
            grad = torch.full((1, 3), number, dtype=torch.bfloat16)
            OPS.linear_wgrad_(weight, bias, grad, value, beta=beta)
        assert torch.equal(weight, torch.ones(3, in_features))
        assert torch.equal(bias, torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_thread_count_gives_the_same_bits(
    dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    for tokens in (3, 300):
        grad, value = nonzero(tokens, 150, dtype=dtype), nonzero(tokens, 700, dtype=dtype)
        start = nonzero(150, 700), nonzero(150)
        results = []
        for threads in (1, 2, 3, 4, 7):
            set_num_threads(threads)
            weight, bias = (t.clone() for t in start)
            OPS.linear_wgrad_(weight, bias, grad, value)
            results.append((weight, bias))
        for weight, bias in results[1:]:
            assert torch.equal(weight, results[0][0])
            assert torch.equal(bias, results[0][1])


def test_zero_sizes() -> None:
    for beta in (1.0, 0.0):
        check(nonzero(5, 7), nonzero(5), torch.empty(0, 5), torch.empty(0, 7), beta)
        check(nonzero(5, 7), None, torch.empty(2, 0, 5), torch.empty(2, 0, 7), beta)
        check(torch.empty(0, 7), torch.empty(0), torch.empty(3, 0), nonzero(3, 7), beta)
        check(torch.empty(5, 0), nonzero(5), nonzero(3, 5), torch.empty(3, 0), beta)
