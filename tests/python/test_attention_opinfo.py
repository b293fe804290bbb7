"""torch's own samples of scaled_dot_product_attention."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_reference import attention, relative_error
from rounding_bounds import no_further_than
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

(INFO,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _twin(argument: Any) -> Any:
    """The same values in float64, a leaf of another graph."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)


def _leaves(*arguments: Any) -> list[Tensor]:
    return [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Values and gradients against the formula, as near as torch's.

    The samples' scores are large, and so is the cost of rounding them. Dropout multiplies by exact
    numbers: it is held to torch's errors without it.
    """
    count = 0
    errors: dict[str, list[float]] = defaultdict(list)
    stock_errors: dict[str, list[float]] = defaultdict(list)
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=True):
        args = (sample.input, *sample.args)
        kwargs = dict(sample.kwargs)
        dropout_p = kwargs.pop("dropout_p", 0.0)
        twins = [_twin(argument) for argument in args]
        twin_kwargs = {name: _twin(argument) for name, argument in kwargs.items()}
        leaves = _leaves(*args, *kwargs.values())
        twin_leaves = _leaves(*twins, *twin_kwargs.values())
        seed = torch.tensor([count])

        out, _ = torch.ops.torch_ext.attention_forward(
            *args, dropout_p=dropout_p, dropout_seed=seed if dropout_p else None, **kwargs
        )
        theirs = F.scaled_dot_product_attention(*args, **kwargs)
        plain, _ = attention(*twins, **twin_kwargs)
        assert out.shape == theirs.shape
        assert out.dtype == theirs.dtype
        expected = plain
        if dropout_p:
            sizes = (*out.shape[:-1], args[1].size(-2))
            keep = torch.ops.torch_ext.attention_dropout_mask(seed, dropout_p, sizes)
            expected, _ = attention(*twins, dropout_p=dropout_p, keep=keep, **twin_kwargs)

        grad_out = torch.randn_like(out)
        ours, stock = (_with_gradients(o, leaves, grad_out) for o in (out, theirs))
        exact, stock_exact = (
            _with_gradients(o, twin_leaves, grad_out.double()) for o in (expected, plain)
        )
        assert [g.dtype for g in ours] == [out.dtype, *(leaf.dtype for leaf in leaves)]
        floor = max(float(torch.linalg.vector_norm(t)) for t in exact[1:])
        for name, mine, other, *references in zip(
            ("out", "query", "key", "value", "mask"),
            ours,
            stock,
            exact,
            stock_exact,
            strict=False,
        ):
            least = 0.0 if name == "out" else floor
            errors[name].append(relative_error(mine, references[0], least))
            stock_errors[name].append(relative_error(other, references[1], least))
        count += 1
    assert count >= 20
    # Sums: the samples are a few rows each, whose errors chance decides.
    for name, found in errors.items():
        bound = no_further_than(sum(stock_errors[name]), len(found), dtype)
        assert sum(found) <= bound, f"{name}: {found}, stock {stock_errors[name]}"


def _with_gradients(out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, leaves, grad_out, retain_graph=True)]
