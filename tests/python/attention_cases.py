"""Attention calls to test: shapes, masks and options, and how close to the formula they come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_reference import attention, relative_error
from torch import Tensor

# Relative errors in norm that are allowed against float64: of outputs, of gradients.
TOLERANCES = {torch.float32: (3e-6, 9e-6), torch.float64: (1e-12, 1e-12)}
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


@dataclass(frozen=True)
class AttentionCase:
    """One call. Sizes as in attention_reference.attention; value defaults to key's shape."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype | None = None  # None: the dtype of query
    padding: tuple[int, ...] | None = None
    is_causal: bool = False
    causal_offset: int = 0
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.key if self.value is None else self.value

    @property
    def options(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "causal_offset": self.causal_offset,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }

    def tensors(self, dtype: torch.dtype) -> AttentionTensors:
        """Random tensors of the case; floating ones require gradients."""
        result = AttentionTensors(
            *(
                torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
                for shape in (self.query, self.key, self.value_shape)
            )
        )
        if self.mask is not None and self.mask_dtype is torch.bool:
            result.attn_mask = torch.rand(self.mask) < 0.7
        elif self.mask is not None:
            result.attn_mask = torch.randn(self.mask, dtype=torch.float64).to(
                self.mask_dtype or dtype
            )
            result.attn_mask.requires_grad_()
        if self.padding is not None:
            result.key_padding_mask = torch.rand(self.padding) < 0.3
        return result

    def __str__(self) -> str:
        parts = [_text(self.query), _text(self.key)]
        if self.value is not None:
            parts.append(_text(self.value))
        if self.mask is not None:
            parts.append(f"mask{_text(self.mask)}")
        if self.mask_dtype is not None:
            parts.append(str(self.mask_dtype).removeprefix("torch."))
        if self.padding is not None:
            parts.append(f"padding{_text(self.padding)}")
        if self.is_causal:
            parts.append(f"causal{self.causal_offset or ''}")
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        if self.enable_gqa:
            parts.append("gqa")
        return "-".join(parts)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass
class AttentionTensors:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.query, self.key, self.value, self.attn_mask

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in self.inputs if t is not None and t.requires_grad]

    def double(self) -> AttentionTensors:
        """The same values in float64, leaves of another graph."""

        def twin(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        mask = self.attn_mask
        if mask is not None and mask.is_floating_point():
            mask = twin(mask)
        return AttentionTensors(
            twin(self.query), twin(self.key), twin(self.value), mask, self.key_padding_mask
        )


@dataclass
class AttentionResult:
    out: Tensor
    grads: list[Tensor] = field(default_factory=list)
    logsumexp: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """out, and the gradients by the names of their inputs."""
        names = ("out", "query", "key", "value", "attn_mask")
        return dict(zip(names, [self.out, *self.grads], strict=False))


def fused(case: AttentionCase, tensors: AttentionTensors, grad_out: Tensor) -> AttentionResult:
    """What torch_ext::attention_forward and its gradient give."""
    out, logsumexp = torch.ops.torch_ext.attention_forward(
        *tensors.inputs, key_padding_mask=tensors.key_padding_mask, **case.options
    )
    grads = torch.autograd.grad(out, tensors.differentiable, grad_out.to(out.dtype))
    return AttentionResult(out.detach(), list(grads), logsumexp.detach())


def formula(
    case: AttentionCase,
    tensors: AttentionTensors,
    grad_out: Tensor,
    rounding: torch.dtype | None = None,
) -> AttentionResult:
    """The same from the formula in float64, rounded where a fused kernel rounds if asked to."""
    twins = tensors.double()
    out, logsumexp = attention(
        *twins.inputs, key_padding_mask=twins.key_padding_mask, rounding=rounding, **case.options
    )
    grads = torch.autograd.grad(out, twins.differentiable, grad_out.double())
    result = AttentionResult(out.detach(), list(grads), logsumexp.detach())
    if rounding is not None:
        result.out = result.out.to(rounding)
        result.grads = [grad.to(rounding) for grad in result.grads]
    return result


def stock(case: AttentionCase, tensors: AttentionTensors, grad_out: Tensor) -> AttentionResult:
    """The same from torch's own attention, every mask given as attn_mask."""
    twins = AttentionTensors(*(t.detach().requires_grad_() for t in tensors.inputs[:3]))
    mask = tensors.attn_mask
    if mask is not None:
        mask = mask.detach().requires_grad_(mask.is_floating_point())
        twins.attn_mask = mask
    excluded = torch.zeros((), dtype=torch.bool)
    is_causal = case.is_causal
    if case.is_causal and (case.causal_offset or tensors.key_padding_mask is not None):
        is_causal = False
        rows = torch.arange(case.query[-2])[:, None]
        excluded = excluded | (torch.arange(case.key[-2]) > rows + case.causal_offset)
    if tensors.key_padding_mask is not None:
        padding = tensors.key_padding_mask[..., None, :]
        excluded = excluded | (padding[..., None, :, :] if len(case.query) >= 3 else padding)
    if excluded.dim():
        if mask is None:
            mask = ~excluded
        elif mask.dtype is torch.bool:
            mask = mask & ~excluded
        else:
            mask = mask.masked_fill(excluded, -torch.inf)
    # torch 2.15 gives NaN for a negative scale where it takes the square root of it.
    negative = case.scale is not None and case.scale < 0
    out = F.scaled_dot_product_attention(
        -twins.query if negative else twins.query,
        twins.key,
        twins.value,
        mask,
        is_causal=is_causal,
        scale=-case.scale if negative else case.scale,
        enable_gqa=case.enable_gqa,
    )
    grads = torch.autograd.grad(out, twins.differentiable, grad_out.to(out.dtype))
    return AttentionResult(out.detach(), list(grads))


def check_case(
    case: AttentionCase,
    dtype: torch.dtype,
    prepare: Callable[[AttentionTensors], None] | None = None,
) -> None:
    """Output, logsumexp and every gradient of one call against the formula.

    float32 and float64 within TOLERANCES; bfloat16 and float16 no worse than torch's attention.
    prepare: changes the tensors first, for example their strides.
    """
    tensors = case.tensors(dtype)
    if prepare is not None:
        prepare(tensors)
    with torch.no_grad():
        expected_out, _ = attention(
            *tensors.inputs, key_padding_mask=tensors.key_padding_mask, **case.options
        )
    # Rounded once, so that everybody gets the same one.
    grad_out = torch.randn(expected_out.shape, dtype=torch.float64).to(dtype)

    actual = fused(case, tensors, grad_out)
    expected = formula(case, tensors, grad_out)
    assert actual.out.dtype == dtype
    assert actual.out.shape == expected.out.shape
    assert [g.shape for g in actual.grads] == [t.shape for t in tensors.differentiable]
    assert [g.dtype for g in actual.grads] == [t.dtype for t in tensors.differentiable]
    check_logsumexp(actual.logsumexp, expected.logsumexp, dtype)
    if dtype in TOLERANCES:
        check_result(actual, expected, dtype, case.scale)
    else:
        fused_formula = formula(case, tensors, grad_out, rounding=dtype)
        check_no_worse(actual, [stock(case, tensors, grad_out), fused_formula], expected, dtype)


def check_logsumexp(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """-inf in the same places, elsewhere to the accuracy of its own type.

    From bfloat16, where exp is a shorter polynomial, to 1 / 32 of an eps of bfloat16.
    """
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    empty = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, empty)
    tolerance = 1e-12 if actual.dtype == torch.float64 else 3e-6
    if dtype == torch.bfloat16:
        tolerance = torch.finfo(dtype).eps / 32
    torch.testing.assert_close(
        actual[~empty].double(), expected[~empty], rtol=tolerance, atol=tolerance
    )


def check_result(
    actual: AttentionResult,
    expected: AttentionResult,
    dtype: torch.dtype,
    scale: float | None = None,
) -> None:
    out_tolerance, grad_tolerance = TOLERANCES[dtype]
    error = relative_error(actual.out, expected.out)
    assert error <= out_tolerance, f"out: {error:.3g}"
    floor = 10 * rounding_floor(expected)
    # Scores are rounded in proportion to their size, and exp() makes that a relative error.
    grad_tolerance *= max(1.0, scale or 1.0)
    for index, (grad, exact) in enumerate(zip(actual.grads, expected.grads, strict=True)):
        error = relative_error(grad, exact, floor)
        assert error <= grad_tolerance, f"gradient {index}: {error:.3g}"


def rounding_floor(expected: AttentionResult) -> float:
    """A gradient this small against the others is rounding, as the query's is for one key."""
    norms = [float(torch.linalg.vector_norm(g)) for g in expected.grads]
    return 0.1 * max(norms, default=0.0)


def check_no_worse(
    actual: AttentionResult,
    others: list[AttentionResult],
    expected: AttentionResult,
    dtype: torch.dtype,
) -> None:
    """Errors against float64 at most the others', or what rounding the exact result costs.

    Where torch falls back to its unfused path in float32, the other is the formula with the
    roundings of torch's fused one.
    """
    floor = rounding_floor(expected)

    def results(result: AttentionResult) -> list[Tensor]:
        return [result.out, *result.grads]

    for name, mine, exact, *theirs in zip(
        ("out", "query", "key", "value", "attn_mask"),
        *map(results, [actual, expected, *others]),
        strict=False,
    ):
        bounds = [relative_error(x, exact, floor) for x in (exact.to(dtype), *theirs)]
        # What is zero but for rounding is as small as the dtype can tell.
        if float(torch.linalg.vector_norm(exact)) < floor:
            bounds.append(torch.finfo(dtype).eps)
        # Where both errors are those of the same roundings, chance decides which is the smaller:
        # with each row's share of the roundings drawn once.
        rows = max(exact.numel() // max(exact.shape[-1], 1), 1) if exact.dim() else 1
        chance = 0.05 + 3.0 / math.sqrt(rows)
        error = relative_error(mine, exact, floor)
        assert error <= (1.0 + chance) * max(bounds), f"{name}: {error:.3g}, others {bounds}"
