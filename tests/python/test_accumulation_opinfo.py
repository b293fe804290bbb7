"""torch's own samples of the foreach operators, with ours in their place; errors in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accumulation_cases import DTYPES, OPS, assert_one_rounding, dtype_id
from optimizer_step_cases import FusedAdam, FusedSgd, assert_near, leaves, torch_step
from torch import Tensor
from torch.testing._internal.common_methods_invocations import (
    foreach_binary_op_db,
    foreach_pointwise_op_db,
    foreach_reduce_op_db,
)
from torch.testing._internal.common_optimizers import optim_db


def _op(database: list[Any], name: str) -> Any:
    (info,) = [op for op in database if op.name == name]
    return info


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """As accumulators: in memory of their own, with their strides."""
    result = []
    for tensor in tensors:
        mine = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        result.append(mine.copy_(tensor))
    return result


def _is_list_of_same_shapes(first: Any, second: Any) -> bool:
    return (
        isinstance(second, list)
        and len(first) == len(second)
        and all(
            isinstance(b, Tensor) and a.shape == b.shape and b.dtype in DTYPES
            for a, b in zip(first, second, strict=True)
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_samples_of_foreach_add(dtype: torch.dtype, noncontiguous: bool) -> None:
    info = _op(foreach_binary_op_db, "_foreach_add")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, noncontiguous=noncontiguous):
        tensors = list(sample.input)
        other = sample.args[0] if sample.args else None
        if not _is_list_of_same_shapes(tensors, other):
            continue  # a number, or shapes to broadcast
        alpha = float(sample.kwargs.get("alpha", 1.0))
        accumulators = _distinct(tensors)
        expected = [a.double() + alpha * b.double() for a, b in zip(tensors, other, strict=True)]
        OPS.grad_accumulate_(accumulators, other, scale=torch.tensor(alpha, dtype=torch.float64))
        for mine, wanted in zip(accumulators, expected, strict=True):
            assert_one_rounding(mine, wanted, terms=20)
        count += 1
    assert count >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_samples_of_foreach_addcmul_as_lists(dtype: torch.dtype) -> None:
    """Larger lists of varied sizes; the first two operands."""
    info = _op(foreach_pointwise_op_db, "_foreach_addcmul")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, noncontiguous=False):
        tensors = list(sample.input)
        other = sample.args[0]
        if not _is_list_of_same_shapes(tensors, other):
            continue
        accumulators = _distinct(tensors)
        expected = [0.5 * a.double() + b.double() for a, b in zip(tensors, other, strict=True)]
        OPS.grad_accumulate_(accumulators, list(other), beta=0.5)
        for mine, wanted in zip(accumulators, expected, strict=True):
            assert_one_rounding(mine, wanted, terms=20)
        count += 1
    assert count >= 5


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_samples_of_foreach_norm(dtype: torch.dtype, noncontiguous: bool) -> None:
    info = _op(foreach_reduce_op_db, "_foreach_norm")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, noncontiguous=noncontiguous):
        tensors = list(sample.input)
        if not all(t.dtype in DTYPES for t in tensors):
            continue
        norm, norms, _ = OPS.grad_stats(tensors)
        expected = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
        rtol = 1e-12 if norm.dtype is torch.float64 else 2e-7
        torch.testing.assert_close(norms.double(), expected, rtol=rtol, atol=0, equal_nan=True)
        total = torch.linalg.vector_norm(expected)
        torch.testing.assert_close(norm.double(), total, rtol=rtol, atol=0, equal_nan=True)
        count += 1
    assert count >= 5


def _optimizer_inputs(name: str) -> list[dict[str, Any]]:
    """The settings that torch tests its own optimizer with."""
    (info,) = [o for o in optim_db if o.optim_cls.__name__ == name]
    settings = []
    for sample in info.optim_inputs_func(device="cpu", dtype=torch.float64):
        kwargs = dict(sample.kwargs)
        if {"capturable", "differentiable"} & {k for k, v in kwargs.items() if v}:
            continue
        settings.append(
            {
                k: v
                for k, v in kwargs.items()
                if k not in ("foreach", "fused", "capturable", "differentiable")
            }
        )
    return settings


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_settings_of_torchs_adam_tests(name: str) -> None:
    settings = _optimizer_inputs(name)
    assert len(settings) >= 5
    for kwargs in settings:
        start = [torch.randn(6, 7, dtype=torch.float64), torch.randn(70, dtype=torch.float64)]
        theirs = leaves(start)
        lr = kwargs.get("lr", 1e-3)
        optimizer = getattr(torch.optim, name)(theirs, foreach=False, **kwargs)
        ours = FusedAdam([t.clone() for t in start], amsgrad=kwargs.get("amsgrad", False))
        betas = [float(b) for b in kwargs.get("betas", (0.9, 0.999))]
        for _ in range(3):
            grads = [torch.randn_like(t) for t in start]
            torch_step(optimizer, theirs, grads)
            ours.step(
                grads,
                lr=lr,
                beta1=betas[0],
                beta2=betas[1],
                eps=kwargs.get("eps", 1e-8),
                weight_decay=kwargs.get("weight_decay", 1e-2 if name == "AdamW" else 0.0),
                decoupled=name == "AdamW" or kwargs.get("decoupled_weight_decay", False),
                maximize=kwargs.get("maximize", False),
            )
        assert_near(ours.params, theirs, 1e-13)


def test_settings_of_torchs_sgd_tests() -> None:
    settings = _optimizer_inputs("SGD")
    assert len(settings) >= 5
    for kwargs in settings:
        start = [torch.randn(6, 7, dtype=torch.float64), torch.randn(70, dtype=torch.float64)]
        theirs = leaves(start)
        optimizer = torch.optim.SGD(theirs, foreach=False, **kwargs)
        ours = FusedSgd([t.clone() for t in start], momentum=kwargs.get("momentum", 0.0))
        for _ in range(3):
            grads = [torch.randn_like(t) for t in start]
            torch_step(optimizer, theirs, grads)
            rest = {k: v for k, v in kwargs.items() if k not in ("lr", "momentum")}
            ours.step(grads, lr=kwargs.get("lr", 1e-3), **rest)
        assert_near(ours.params, theirs, 1e-13)
