"""Runs something from one seed, stock, with the drop-in on and in float64, and compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rounding_bounds import assert_no_further, in_float64
from torch import Tensor, nn

import torch_ext


def ran_fused() -> bool:
    return torch_ext.last_attention_path().startswith("cpu.")


def outputs_and_gradients(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: tuple[Tensor, ...] = (),
    grad_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """What the call gives, and the gradients of its first output in parameters and inputs.

    grad_dtype: what the output's gradient is rounded to; None: the output's dtype.
    """
    module.zero_grad(set_to_none=True)
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(7)
    result = call()
    tensors = result if isinstance(result, tuple) else (result,)
    found = {f"output {i}": t for i, t in enumerate(tensors) if isinstance(t, Tensor)}
    first = found["output 0"]
    if first.requires_grad:
        torch.manual_seed(8)
        grad = torch.randn(first.shape).to(grad_dtype or first.dtype)  # whatever its strides
        first.backward(grad.to(first.dtype))
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
        for index, tensor in enumerate(inputs):
            if tensor.grad is not None:
                found[f"gradient of input {index}"] = tensor.grad
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def exact_outputs_and_gradients(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: tuple[Tensor, ...],
    stock: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The same computed in float64 from the same numbers."""

    def exact() -> Any:
        with in_float64():
            return call()

    return outputs_and_gradients(module, exact, inputs, stock["output 0"].dtype)


def compare_with_stock(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: tuple[Tensor, ...] = (),
    fused: bool = True,
) -> None:
    """With the drop-in on the call gives the same, gradients too, as near to float64 as stock.

    fused: in our kernels.
    """
    stock = outputs_and_gradients(module, call, inputs)
    exact = exact_outputs_and_gradients(module, call, inputs, stock)
    with torch_ext.enabled():
        ours = outputs_and_gradients(module, call, inputs)
        if fused:
            assert ran_fused(), torch_ext.last_attention_path()
    assert_no_further(ours, stock, exact)
