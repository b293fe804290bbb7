"""What torch.library promises of an operator: opcheck, Meta, autocast, gradcheck, hooks, modes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, AttentionCase
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.torch_ext


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def _qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> list[Tensor]:
    return [_leaf(2, h, n, 8, dtype=dtype) for h, n in ((4, 5), (kv_heads, 7), (kv_heads, 7))]


def _bool(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


_SEED = torch.tensor([11])

SAMPLES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "plain": (_qkv(), {}),
    "bf16": (_qkv(torch.bfloat16), {}),
    "fp64_causal": (_qkv(torch.float64), {"is_causal": True}),
    "no_grad_needed": ([t.detach() for t in _qkv()], {}),
    "bool_mask": ([*_qkv(), _bool(5, 7)], {"scale": 0.3}),
    "additive_mask": ([*_qkv(), _leaf(2, 1, 5, 7)], {}),
    "additive_mask_no_grad": ([*_qkv(), torch.randn(1, 7)], {}),
    "gqa": (_qkv(kv_heads=2), {"enable_gqa": True}),
    "value_dim": ([_leaf(3, 5, 8), _leaf(3, 7, 8), _leaf(3, 7, 6)], {}),
    "two_dimensions": ([_leaf(5, 8), _leaf(7, 8), _leaf(7, 8)], {}),
    "five_dimensions": ([_leaf(2, 1, 3, 5, 8), _leaf(1, 2, 3, 7, 8), _leaf(3, 7, 8)], {}),
}
FORWARD_ONLY: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "padding": (_qkv(), {"key_padding_mask": _bool(2, 7)}),
    "offset": (_qkv(), {"is_causal": True, "causal_offset": 2}),
    "dropout": ([*_qkv(), None, 0.3], {"dropout_seed": _SEED}),
    "dropout_mask": ([*_qkv(), _leaf(4, 5, 7), 0.3], {"dropout_seed": _SEED}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_sdpa(name: str) -> None:
    args, kwargs = SAMPLES[name]
    torch.library.opcheck(OPS.scaled_dot_product_attention.default, tuple(args), kwargs)


@pytest.mark.parametrize("name", [*SAMPLES, *FORWARD_ONLY])
def test_opcheck_forward(name: str) -> None:
    args, kwargs = {**SAMPLES, **FORWARD_ONLY}[name]
    torch.library.opcheck(OPS.attention_forward.default, tuple(args), kwargs)


@pytest.mark.parametrize("name", [*SAMPLES, *FORWARD_ONLY])
def test_opcheck_backward(name: str) -> None:
    args, kwargs = {**SAMPLES, **FORWARD_ONLY}[name]
    with torch.no_grad():
        out, logsumexp = OPS.attention_forward(*args, **kwargs)
    requires_grad = args[0].requires_grad
    grad_out = torch.randn_like(out).requires_grad_(requires_grad)
    grad_logsumexp = torch.randn_like(logsumexp).requires_grad_(requires_grad)
    additive = len(args) > 3 and args[3] is not None and args[3].is_floating_point()
    for output_mask, second in (
        ([True, True, True, additive, False], grad_logsumexp),
        ([True, False, True, False, False], None),
    ):
        torch.library.opcheck(
            OPS.attention_backward.default,
            (grad_out, second, *args[:3], out, logsumexp, *args[3:]),
            {**kwargs, "output_mask": output_mask},
        )


def test_opcheck_dropout_mask() -> None:
    torch.library.opcheck(OPS.attention_dropout_mask.default, (_SEED, 0.3, [2, 3, 5, 7]))


def _self_attention_arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    embed = 12
    return [
        _leaf(2, 5, embed, dtype=dtype),
        _leaf(3 * embed, embed, dtype=dtype),
        _leaf(3 * embed, dtype=dtype),
        _leaf(embed, embed, dtype=dtype),
        _leaf(embed, dtype=dtype),
        3,
    ]


SELF_SAMPLES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "plain": (_self_attention_arguments(), {}),
    "bf16_causal": (_self_attention_arguments(torch.bfloat16), {"is_causal": True}),
    "mask": ([*_self_attention_arguments(), _leaf(3, 5, 5)], {}),
    "padding": ([*_self_attention_arguments(), _bool(5, 5)], {"key_padding_mask": _bool(2, 5)}),
}


@pytest.mark.parametrize("name", SELF_SAMPLES)
def test_opcheck_self_attention(name: str) -> None:
    args, kwargs = SELF_SAMPLES[name]
    torch.library.opcheck(OPS.self_attention.default, tuple(args), kwargs)


@pytest.mark.parametrize("name", SELF_SAMPLES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_packed(dropout_p: float, name: str) -> None:
    args, kwargs = SELF_SAMPLES[name]
    qkv = F.linear(*args[:3]).detach().requires_grad_()
    mask = args[6] if len(args) > 6 else None
    is_causal = kwargs.get("is_causal", False)
    options = {
        "key_padding_mask": kwargs.get("key_padding_mask"),
        "dropout_seed": _SEED if dropout_p else None,
    }
    torch.library.opcheck(
        OPS.packed_attention_forward.default, (qkv, 3, mask, dropout_p, is_causal), options
    )
    with torch.no_grad():
        out, logsumexp = OPS.packed_attention_forward(qkv, 3, mask, dropout_p, is_causal, **options)
    additive = mask is not None and mask.is_floating_point()
    torch.library.opcheck(
        OPS.packed_attention_backward.default,
        (torch.randn_like(out), None, qkv, 3, out, logsumexp, mask, dropout_p, is_causal),
        {**options, "output_mask": [True, additive, False]},
    )


def _same_metadata(real: Any, other: Any) -> None:
    if isinstance(real, Tensor):
        real, other = (real,), (other,)
    assert len(real) == len(other)
    for mine, theirs in zip(real, other, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_metadata(kind: str, dtype: torch.dtype) -> None:
    """Meta and fake outputs, forward and backward: sizes, strides and dtypes of the real ones."""
    cases = [
        AttentionCase((5, 8), (7, 8)),
        AttentionCase((3, 5, 8), (3, 7, 8), (3, 7, 6), mask=(1, 7)),
        AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), mask=(2, 1, 5, 1)),
        AttentionCase((1, 6, 5, 8), (4, 2, 7, 8), enable_gqa=True, mask=(6, 5, 7)),
        AttentionCase((2, 2, 3, 5, 8), (2, 1, 3, 7, 8), is_causal=True),
        AttentionCase((2, 3, 0, 8), (2, 3, 7, 8)),
        AttentionCase((2, 3, 5, 8), (2, 3, 0, 8)),
        AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), mask=(5, 7), mask_dtype=torch.float32),
    ]

    def run(device: str, case: AttentionCase, inputs: list[Tensor | None]) -> tuple[Any, Any, Any]:
        inputs = [
            None
            if t is None
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            if device == "fake"
            else t.detach().to(device)
            for t in inputs
        ]
        forward = OPS.attention_forward(*inputs, **case.options)
        sdpa = OPS.scaled_dot_product_attention(
            *inputs, is_causal=case.is_causal, enable_gqa=case.enable_gqa
        )
        grad_out = torch.empty_like(forward[0])
        backward = OPS.attention_backward(
            grad_out,
            None,
            *inputs[:3],
            *forward,
            inputs[3],
            **case.options,
            output_mask=[True, True, True, inputs[3] is not None, False],
        )
        return forward, sdpa, backward

    for case in cases:
        tensors = case.tensors(dtype)
        inputs = [None if t is None else t.detach() for t in tensors.inputs]
        inputs[0] = inputs[0].transpose(0, -2).contiguous().transpose(0, -2)
        real = run("cpu", case, inputs)
        if kind == "meta":
            other = run("meta", case, inputs)
        else:
            with FakeTensorMode():
                other = run("fake", case, inputs)
        for mine, theirs in zip(real, other, strict=True):
            _same_metadata(mine, theirs)


def test_metadata_of_packed_and_dropout_mask() -> None:
    args = [t.detach() if isinstance(t, Tensor) else t for t in _self_attention_arguments()]
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in args]
    _same_metadata(OPS.self_attention(*args), OPS.self_attention(*meta))
    _same_metadata(
        OPS.attention_dropout_mask(_SEED, 0.5, [2, 3, 4]),
        OPS.attention_dropout_mask(_SEED.to("meta"), 0.5, [2, 3, 4]),
    )
    qkv = torch.randn(2, 5, 36)
    real = OPS.packed_attention_forward(qkv, 3)
    fake = OPS.packed_attention_forward(qkv.to("meta"), 3)
    _same_metadata(real, fake)
    _same_metadata(
        OPS.packed_attention_backward(real[0], None, qkv, 3, *real)[:1],
        OPS.packed_attention_backward(fake[0], None, qkv.to("meta"), 3, *fake)[:1],
    )


GRADCHECK_CASES = [
    AttentionCase((2, 3, 4), (2, 5, 4)),
    AttentionCase((2, 3, 4), (2, 5, 4), (2, 5, 3), is_causal=True, causal_offset=1),
    AttentionCase((3, 4), (5, 4), mask=(3, 5)),
    AttentionCase((1, 2, 3, 4), (2, 1, 5, 4), mask=(2, 1, 5)),
    AttentionCase((1, 4, 3, 4), (1, 2, 5, 4), mask=(3, 1), enable_gqa=True),
    AttentionCase((1, 2, 3, 4), (1, 2, 5, 4), mask=(3, 5), mask_dtype=torch.bool, scale=-0.7),
    AttentionCase((2, 2, 3, 4), (2, 2, 5, 4), padding=(2, 5)),
    AttentionCase((1, 2, 1, 4), (1, 2, 5, 4)),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
@pytest.mark.parametrize("check", ["gradcheck", "gradgradcheck"])
def test_gradients(check: str, case: AttentionCase, dropout_p: float) -> None:
    tensors = case.tensors(torch.float64)
    leaves = tensors.differentiable

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, *mask = inputs
        return OPS.attention_forward(
            query,
            key,
            value,
            mask[0] if mask else tensors.attn_mask,
            dropout_p,
            key_padding_mask=tensors.key_padding_mask,
            dropout_seed=_SEED if dropout_p else None,
            **case.options,
        )

    if case.padding is not None:
        tensors.key_padding_mask[:, 0] = False  # logsumexp of no keys has no numeric derivative
    if case.mask_dtype is torch.bool:
        tensors.attn_mask[:, 0] = True
    if check == "gradcheck":
        assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
    else:
        assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)


def test_gradcheck_self_attention() -> None:
    args = _self_attention_arguments(torch.float64)
    mask = _leaf(3, 1, 5, dtype=torch.float64)

    def function(mask: Tensor, *parameters: Tensor) -> Tensor:
        return OPS.self_attention(*parameters, 3, mask)

    assert torch.autograd.gradcheck(function, (mask, *args[:5]))
    assert torch.autograd.gradgradcheck(function, (mask, *args[:5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast_eager(mask: str | None, dtype: torch.dtype) -> None:
    """The result's dtype, and the values, are those of F.scaled_dot_product_attention."""
    attn_mask = {None: None, "bool": _bool(5, 7), "float": torch.randn(5, 7)}[mask]
    for input_dtype in (torch.float32, dtype, torch.float64):
        query, key, value = _qkv(input_dtype)
        float_mask = attn_mask
        if mask == "float" and input_dtype is torch.float64:
            float_mask = attn_mask.double()
        with torch.autocast("cpu", dtype):
            out = OPS.scaled_dot_product_attention(query, key, value, float_mask)
            stock = F.scaled_dot_product_attention(query, key, value, float_mask)
            forward, _ = OPS.attention_forward(query, key, value, float_mask)
        assert out.dtype == stock.dtype == forward.dtype
        assert torch.equal(out, forward)
        assert_same_but_for_rounding(out, stock)
        grads = torch.autograd.grad(out.sum(), (query, key, value))
        assert all(g.dtype == input_dtype for g in grads)


def test_autocast_mixed_inputs() -> None:
    """Under autocast the inputs need not be of one dtype, as they do elsewhere."""
    query, key, value = _qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = OPS.scaled_dot_product_attention(query.bfloat16(), key, value.half())
    assert out.dtype is torch.bfloat16


def test_autocast_off_inside() -> None:
    query, key, value = _qkv()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert OPS.scaled_dot_product_attention(query, key, value).dtype is torch.float32


def test_autocast_self_attention() -> None:
    args = _self_attention_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out = OPS.self_attention(*args)
    assert out.dtype is torch.bfloat16
    assert_same_but_for_rounding(out, OPS.self_attention(*args))
    grads = torch.autograd.grad(out.sum(), args[:5])
    assert all(g.dtype is torch.float32 for g in grads)


def test_schemas() -> None:
    """The surface that others build on."""
    scores = (
        "SymInt[2] window_size=[-1, -1], float softcap=0., Tensor? alibi_slopes=None, "
        "Tensor? sink=None, bool causal_lower_right=False) -> Tensor"
    )
    assert str(OPS.scaled_dot_product_attention.default._schema) == (
        "torch_ext::scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, "
        "Tensor? attn_mask=None, float dropout_p=0., bool is_causal=False, *, float? scale=None, "
        "bool enable_gqa=False, " + scores
    )
    assert str(OPS.self_attention.default._schema) == (
        "torch_ext::self_attention(Tensor input, Tensor in_proj_weight, Tensor? in_proj_bias, "
        "Tensor out_proj_weight, Tensor? out_proj_bias, int num_heads, Tensor? attn_mask=None, "
        "float dropout_p=0., bool is_causal=False, *, Tensor? key_padding_mask=None, " + scores
    )
    for name in (
        "scaled_dot_product_attention",
        "attention_forward",
        "attention_backward",
        "self_attention",
    ):
        assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags
    for name in ("scaled_dot_product_attention", "self_attention"):
        assert torch.Tag.nondeterministic_seeded in getattr(OPS, name).default.tags


def test_second_order_in_single_precision() -> None:
    """Against the formula's own second derivatives, with everything at once, dropout too."""
    from attention_reference import attention

    query, key, value = (_leaf(2, h, n, 16) for h, n in ((6, 21), (2, 40), (2, 40)))
    mask = _leaf(6, 1, 40)
    leaves = [query, key, value, mask]
    padding = _bool(2, 40).logical_not()
    keep = OPS.attention_dropout_mask(_SEED, 0.3, (2, 6, 21, 40))
    options = {"enable_gqa": True, "key_padding_mask": padding, "dropout_p": 0.3}
    twins = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for inputs, outputs in (
        (leaves, OPS.attention_forward(*leaves, dropout_seed=_SEED, **options)),
        (twins, attention(*twins, keep=keep, **options)),
    ):
        scalar = outputs[0].sin().sum() + outputs[1].cos().sum()
        first = torch.autograd.grad(scalar, inputs, create_graph=True)
        penalty = sum((g.square().sum() for g in first), start=torch.zeros(()))
        results.append(torch.autograd.grad(penalty, inputs))
    for mine, exact in zip(*results, strict=True):
        assert_same_but_for_rounding(mine, exact)


def test_third_order() -> None:
    from attention_reference import attention

    leaves = [_leaf(3, 4, dtype=torch.float64) for _ in range(3)]
    results = []
    for function in (OPS.attention_forward, attention):
        value: Any = function(*leaves)[0].sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.sin().sum() for g in grads)
        results.append(value.detach())
    assert_same_but_for_rounding(*results)


def test_arguments_by_name_and_default() -> None:
    query, key, value = _qkv()
    names = ("query", "key", "value")
    out = OPS.scaled_dot_product_attention(**dict(zip(names, (query, key, value), strict=True)))
    assert torch.equal(out, OPS.scaled_dot_product_attention(query, key, value, None, 0.0, False))
    for scale, gqa in itertools.product((None, 0.25), (False, True)):
        named = OPS.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=gqa)
        assert named.shape == out.shape
