"""Runs something twice from one seed, stock and with the drop-in on, and compares all it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext

TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-10,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}


def ran_fused() -> bool:
    return torch_ext.last_attention_path().startswith("cpu.")


def outputs_and_gradients(
    module: nn.Module, call: Callable[[], Any], inputs: tuple[Tensor, ...] = ()
) -> dict[str, Tensor]:
    """What the call gives, and the gradients of its first output in parameters and inputs."""
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
        first.backward(torch.randn(first.shape, dtype=first.dtype))  # whatever its strides
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
        for index, tensor in enumerate(inputs):
            if tensor.grad is not None:
                found[f"gradient of input {index}"] = tensor.grad
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(ours: dict[str, Tensor], stock: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert ours[name].shape == expected.shape, name
        # Gradients of whole layers are sums: measured against their largest entry.
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours[name],
            expected,
            atol=tolerance * scale,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def compare_with_stock(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: tuple[Tensor, ...] = (),
    tolerance: float | None = None,
    fused: bool = True,
) -> None:
    """With the drop-in on the call has to give the same, gradients too; fused: in our kernels."""
    if tolerance is None:
        dtype = next(module.parameters()).dtype
        tolerance = TOLERANCE[dtype]
    stock = outputs_and_gradients(module, call, inputs)
    with torch_ext.enabled():
        ours = outputs_and_gradients(module, call, inputs)
        if fused:
            assert ran_fused(), torch_ext.last_attention_path()
    assert_same(ours, stock, tolerance)
