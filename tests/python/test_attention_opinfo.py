"""torch's own samples of scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_reference import attention, relative_error
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

(INFO,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative errors in norm: the samples' scores are large, and so is what rounding them costs.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}


def _twin(argument: Any) -> Any:
    """The same values in float64, a leaf of another graph."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)


def _leaves(*arguments: Any) -> list[Tensor]:
    return [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Values and gradients against the formula, and the values against torch's."""
    count = 0
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=True):
        args = (sample.input, *sample.args)
        kwargs = dict(sample.kwargs)
        dropout_p = kwargs.pop("dropout_p", 0.0)
        twins = [_twin(argument) for argument in args]
        twin_kwargs = {name: _twin(argument) for name, argument in kwargs.items()}
        seed = torch.tensor([count])
        out, _ = torch.ops.torch_ext.attention_forward(
            *args, dropout_p=dropout_p, dropout_seed=seed if dropout_p else None, **kwargs
        )
        if dropout_p:
            sizes = (*out.shape[:-1], args[1].size(-2))
            keep = torch.ops.torch_ext.attention_dropout_mask(seed, dropout_p, sizes)
            expected, _ = attention(*twins, dropout_p=dropout_p, keep=keep, **twin_kwargs)
        else:
            expected, _ = attention(*twins, **twin_kwargs)
            theirs = F.scaled_dot_product_attention(*args, **kwargs)
            assert out.shape == theirs.shape
            assert out.dtype == theirs.dtype
            assert relative_error(theirs, expected) <= TOLERANCES[dtype]
        assert relative_error(out, expected) <= TOLERANCES[dtype]

        leaves = _leaves(*args, *kwargs.values())
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad_out)
        exact_grads = torch.autograd.grad(
            expected, _leaves(*twins, *twin_kwargs.values()), grad_out.double()
        )
        floor = max(float(torch.linalg.vector_norm(g)) for g in exact_grads)
        for leaf, grad, exact in zip(leaves, grads, exact_grads, strict=True):
            assert grad.dtype == leaf.dtype
            assert relative_error(grad, exact, floor) <= TOLERANCES[dtype]
        count += 1
    assert count >= 20
