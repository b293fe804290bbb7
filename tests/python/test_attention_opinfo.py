"""torch's own samples of scaled_dot_product_attention, valid and invalid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_reference import attention
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

(INFO,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


def _leaves(args: tuple[Any, ...]) -> list[Tensor]:
    return [t for t in args if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Values and gradients; where weights are dropped, against the formula with the same mask."""
    count = 0
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=True):
        args = (sample.input, *sample.args)
        kwargs = dict(sample.kwargs)
        dropout_p = kwargs.pop("dropout_p", 0.0)
        if dropout_p:
            seed = torch.tensor([count])
            out, _ = torch.ops.torch_ext.attention_forward(
                *args, dropout_p=dropout_p, dropout_seed=seed, **kwargs
            )
            sizes = (*out.shape[:-1], args[1].size(-2))
            keep = torch.ops.torch_ext.attention_dropout_mask(seed, dropout_p, sizes)
            expected, _ = attention(*args, dropout_p=dropout_p, keep=keep, **kwargs)
            expected = expected.to(dtype)
        else:
            out = torch.ops.torch_ext.scaled_dot_product_attention(*args, **kwargs)
            expected = F.scaled_dot_product_attention(*args, **kwargs)
        torch.testing.assert_close(out, expected, **TOLERANCES[dtype])
        leaves = [*_leaves(args), *_leaves(tuple(kwargs.values()))]
        grad_out = torch.randn_like(out)
        for mine, theirs in zip(
            torch.autograd.grad(out, leaves, grad_out),
            torch.autograd.grad(expected, leaves, grad_out),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, **TOLERANCES[dtype])
        count += 1
    assert count >= 20


def test_error_inputs() -> None:
    count = 0
    for error in INFO.error_inputs("cpu"):
        sample = error.sample_input
        args = (sample.input, *sample.args)
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            F.scaled_dot_product_attention(*args, **sample.kwargs)
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            torch.ops.torch_ext.scaled_dot_product_attention(*args, **sample.kwargs)
        count += 1
    if INFO.error_inputs_func is not None:
        assert count
