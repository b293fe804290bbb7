"""Masks: every shape that broadcasts, both kinds, their gradients, rows that attend to nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import DTYPES, AttentionCase, check_case
from attention_reference import attention, relative_error
from rounding_bounds import assert_same_but_for_rounding, same_but_for_rounding

BATCH, HEADS, Q_LEN, KV_LEN = 2, 3, 21, 70


def _mask_shapes() -> list[tuple[int, ...]]:
    """Every shape of 1 to 4 dimensions that broadcasts to (BATCH, HEADS, Q_LEN, KV_LEN)."""
    full = (BATCH, HEADS, Q_LEN, KV_LEN)
    shapes = []
    for dims in range(1, 5):
        for ones in itertools.product((True, False), repeat=dims):
            shapes.append(
                tuple(1 if one else size for one, size in zip(ones, full[-dims:], strict=True))
            )
    return shapes


@pytest.mark.parametrize("mask_dtype", [torch.bool, None], ids=["bool", "additive"])
@pytest.mark.parametrize("mask", _mask_shapes(), ids=str)
def test_every_shape(mask: tuple[int, ...], mask_dtype: torch.dtype | None) -> None:
    case = AttentionCase(
        (BATCH, HEADS, Q_LEN, 16), (BATCH, HEADS, KV_LEN, 16), mask=mask, mask_dtype=mask_dtype
    )
    check_case(case, torch.float32)


CASES = [
    # more and fewer dimensions than query
    AttentionCase((21, 16), (70, 16), mask=(21, 70)),
    AttentionCase((21, 16), (70, 16), mask=(70,)),
    AttentionCase((21, 16), (70, 16), mask=(21, 1)),
    AttentionCase((3, 21, 16), (3, 70, 16), mask=(3, 1, 70)),
    AttentionCase((3, 21, 16), (3, 70, 16), mask=(21, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(2, 2, 3, 21, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(2, 1, 3, 21, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(1, 2, 1, 21, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(2, 1, 1, 1, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(2, 3, 1, 70)),
    AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), mask=(1,)),
    # decode
    AttentionCase((2, 3, 1, 16), (2, 3, 70, 16), mask=(2, 1, 1, 70)),
    AttentionCase((2, 3, 1, 16), (2, 3, 70, 16), mask=(3, 1, 1)),
    AttentionCase((2, 3, 2, 16), (2, 3, 70, 16), mask=(2, 3, 2, 70)),
    AttentionCase((1, 1, 2, 16), (1, 1, 2050, 16), mask=(2, 2050)),
    # grouped heads: the mask is per query head
    AttentionCase((2, 6, 21, 16), (2, 2, 70, 16), mask=(2, 6, 21, 70), enable_gqa=True),
    AttentionCase((2, 6, 21, 16), (2, 2, 70, 16), mask=(6, 1, 70), enable_gqa=True),
    AttentionCase((2, 6, 21, 16), (2, 1, 70, 16), mask=(6, 21, 1), enable_gqa=True),
    AttentionCase((2, 6, 1, 16), (2, 2, 70, 16), mask=(2, 6, 1, 70), enable_gqa=True),
    AttentionCase((2, 6, 21, 16), (2, 2, 70, 16), mask=(1, 70), enable_gqa=True),
    # broadcast keys: the gradient of each is a sum over what it was broadcast to
    AttentionCase((2, 3, 21, 16), (1, 3, 70, 16), mask=(2, 1, 21, 70)),
    AttentionCase((1, 3, 21, 16), (2, 1, 70, 16), mask=(2, 3, 1, 70)),
    # several tiles each way
    AttentionCase((1, 2, 300, 16), (1, 2, 333, 16), mask=(300, 333)),
    AttentionCase((1, 2, 300, 16), (1, 2, 333, 16), mask=(2, 1, 333)),
    AttentionCase((1, 2, 300, 16), (1, 2, 333, 16), mask=(2, 300, 1)),
    AttentionCase((5, 4, 65, 16), (5, 4, 66, 16), mask=(4, 65, 66)),
    AttentionCase((5, 4, 65, 16), (5, 4, 66, 16), mask=(5, 1, 65, 66)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, None], ids=["bool", "additive"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms(case: AttentionCase, mask_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    check_case(
        AttentionCase(
            case.query, case.key, mask=case.mask, mask_dtype=mask_dtype, enable_gqa=case.enable_gqa
        ),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [(21, 70), (2, 1, 1, 70), (3, 21, 1)], ids=str)
def test_float_mask_of_half_inputs(mask: tuple[int, ...], dtype: torch.dtype) -> None:
    check_case(
        AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), mask=mask, mask_dtype=torch.float32), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), padding=(2, 70)),
        AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), padding=(1, 70)),
        AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), padding=(70,)),
        AttentionCase((2, 3, 70, 16), (2, 3, 70, 16), padding=(2, 70), is_causal=True),
        AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), padding=(2, 70), mask=(3, 21, 70)),
        AttentionCase(
            (2, 3, 21, 16), (2, 3, 70, 16), padding=(2, 70), mask=(21, 70), mask_dtype=torch.bool
        ),
        AttentionCase((2, 6, 21, 16), (2, 2, 70, 16), padding=(2, 70), enable_gqa=True),
        AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), padding=(2, 2, 70)),
        AttentionCase((2, 2, 3, 21, 16), (2, 2, 3, 70, 16), padding=(2, 1, 70)),
        AttentionCase((3, 21, 16), (3, 70, 16), padding=(70,)),
        AttentionCase((21, 16), (70, 16), padding=(70,)),
        AttentionCase((2, 3, 1, 16), (2, 3, 70, 16), padding=(2, 70)),
        AttentionCase((2, 3, 1, 16), (2, 3, 70, 16), padding=(2, 70), mask=(2, 1, 1, 70)),
    ],
    ids=str,
)
def test_key_padding(case: AttentionCase, dtype: torch.dtype) -> None:
    check_case(case, dtype)


def _window(q_len: int, kv_len: int, width: int) -> torch.Tensor:
    distance = torch.arange(q_len)[:, None] - torch.arange(kv_len)
    return (distance >= 0) & (distance < width)


def _blocks(q_len: int, kv_len: int) -> torch.Tensor:
    """Documents packed into one row: tiles that are empty, full and mixed."""
    document = torch.arange(max(q_len, kv_len)) // 90
    return document[:q_len, None] == document[:kv_len]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize(
    "pattern",
    [
        _window(300, 300, 40),
        _blocks(300, 300),
        torch.arange(300).expand(260, 300) < 170,
        torch.arange(300).expand(260, 300) >= 170,
        torch.ones(260, 300, dtype=torch.bool),
        torch.ones(100, 70, dtype=torch.bool).tril(),
    ],
    ids=["window", "blocks", "right_padding", "left_padding", "full", "causal"],
)
def test_patterns(pattern: torch.Tensor, additive: bool, dtype: torch.dtype) -> None:
    """Whole tiles of these masks attend to nothing, or to everything."""
    q_len, kv_len = pattern.shape
    mask = torch.zeros(q_len, kv_len, dtype=dtype).masked_fill(~pattern, -math.inf)

    def prepare(tensors: object) -> None:
        tensors.attn_mask = mask.requires_grad_() if additive else pattern  # type: ignore[attr-defined]

    check_case(AttentionCase((1, 2, q_len, 16), (1, 2, kv_len, 16)), dtype, prepare)


def test_boolean_and_causal_are_the_same() -> None:
    query, key, value = (torch.randn(2, 3, 130, 32) for _ in range(3))
    op = torch.ops.torch_ext.scaled_dot_product_attention
    causal = op(query, key, value, is_causal=True)
    masked = op(query, key, value, torch.ones(130, 130, dtype=torch.bool).tril())
    assert_same_but_for_rounding(causal, masked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "padding", "causal"])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_rows_that_attend_to_nothing(q_len: int, kind: str, dtype: torch.dtype) -> None:
    """0 for their output, 0 gradients from and to them, -inf for logsumexp, and never NaN."""
    kv_len = 75
    shape = (2, 3, q_len, kv_len)
    allowed = torch.rand(shape) < 0.5
    allowed[0, 1] = False  # a whole head
    allowed[1, 2, 0] = False  # one row
    allowed[1, 0, :, 1:] = False  # one key left
    case = AttentionCase((2, 3, q_len, 16), (2, 3, kv_len, 16))
    tensors = case.tensors(dtype)
    options: dict = {}
    if kind == "bool":
        tensors.attn_mask = allowed
    elif kind == "additive":
        mask = torch.randn(shape).to(dtype).masked_fill(~allowed, -math.inf)
        tensors.attn_mask = mask.requires_grad_()
    elif kind == "padding":
        tensors.key_padding_mask = torch.zeros(2, kv_len, dtype=torch.bool)
        tensors.key_padding_mask[1] = True
        allowed = ~tensors.key_padding_mask[:, None, None].expand(shape)
    else:
        options = {"is_causal": True, "causal_offset": -(q_len + 1) // 2}
        offset = options["causal_offset"]
        allowed = torch.ones(shape, dtype=torch.bool).tril(offset)
    empty = ~allowed.any(-1)
    assert empty.any()

    out, logsumexp = torch.ops.torch_ext.attention_forward(
        *tensors.inputs, key_padding_mask=tensors.key_padding_mask, **options
    )
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert torch.equal(logsumexp == -math.inf, empty)
    assert out.isfinite().all()
    assert not logsumexp.isnan().any()

    # The gradient of an empty row's output, and of its logsumexp, must reach nothing.
    grad_out = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, tensors.differentiable, grad_out, retain_graph=True)
    cut = grad_out.masked_fill(empty[..., None], 0.0)
    for grad, grad_cut in zip(
        grads, torch.autograd.grad(out, tensors.differentiable, cut, retain_graph=True), strict=True
    ):
        assert grad.isfinite().all()
        assert torch.equal(grad, grad_cut)
    assert not grads[0][empty].any()
    if kind == "additive":
        assert not grads[3][~allowed].any()

    twins = tensors.double()
    expected_out, expected_logsumexp = attention(
        *twins.inputs, key_padding_mask=twins.key_padding_mask, **options
    )
    expected = torch.autograd.grad(
        [expected_out, expected_logsumexp],
        twins.differentiable,
        [grad_out.double(), torch.ones_like(expected_logsumexp)],
    )
    both = torch.autograd.grad(
        [out, logsumexp], tensors.differentiable, [grad_out, torch.ones_like(logsumexp)]
    )
    for grad, exact in zip(both, expected, strict=True):
        assert relative_error(grad, exact, floor=1e-2) <= same_but_for_rounding(dtype)


def test_huge_values_behind_the_mask() -> None:
    """Keys that nobody attends to may hold anything finite, as unwritten cache slots do."""
    query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))
    allowed = torch.ones(64, 64, dtype=torch.bool)
    allowed[:, 40:] = False
    op = torch.ops.torch_ext.scaled_dot_product_attention
    clean = op(query, key[:, :, :40], value[:, :, :40])
    key, value = key.clone(), value.clone()
    key[:, :, 40:], value[:, :, 40:] = 1e30, -1e30
    assert_same_but_for_rounding(op(query, key, value, allowed), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_mask_value_for_all(dtype: torch.dtype) -> None:
    """A constant added to each score changes nothing, and its gradient is 0 but for rounding."""
    tensors = AttentionCase((2, 3, 21, 16), (2, 3, 70, 16)).tensors(dtype)
    mask = torch.full((1,), 3.0, dtype=dtype, requires_grad=True)
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs[:3], mask)
    plain = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs[:3])
    assert_same_but_for_rounding(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), [mask])
    assert grad.shape == (1,)
    whole = torch.full((2, 3, 21, 70), 3.0, dtype=dtype, requires_grad=True)
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs[:3], whole)
    (terms,) = torch.autograd.grad(out.sum(), [whole])
    assert abs(float(grad)) <= same_but_for_rounding(dtype) * float(terms.abs().sum())


def test_gradient_only_where_wanted() -> None:
    """Each subset of inputs that require gradients gives the gradients of the full set."""
    case = AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), mask=(3, 21, 70))
    tensors = case.tensors(torch.float32)
    op = torch.ops.torch_ext.scaled_dot_product_attention
    grad_out = torch.randn(2, 3, 21, 16)
    full = torch.autograd.grad(op(*tensors.inputs), tensors.differentiable, grad_out)
    for wanted in itertools.product((False, True), repeat=4):
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors.inputs, wanted, strict=True)]
        out = op(*inputs)
        assert out.requires_grad == any(wanted)
        if not any(wanted):
            continue
        leaves = [t for t in inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(out, leaves, grad_out))
        for want, expected in zip(wanted, full, strict=True):
            if want:
                assert_same_but_for_rounding(next(grads), expected)


def test_gradient_asked_of_some() -> None:
    """autograd.grad of a part of the leaves."""
    case = AttentionCase((2, 3, 21, 16), (2, 3, 70, 16), mask=(3, 21, 70))
    tensors = case.tensors(torch.float32)
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs)
    full = torch.autograd.grad(out.sum(), tensors.differentiable, retain_graph=True)
    for index, leaf in enumerate(tensors.differentiable):
        (grad,) = torch.autograd.grad(out.sum(), [leaf], retain_graph=True)
        assert_same_but_for_rounding(grad, full[index])
