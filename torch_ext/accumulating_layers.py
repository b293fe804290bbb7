"""Linear and embedding layers whose backward adds to an accumulator's sums, in a micro-batch only.

While armed, a layer has a ``forward`` of its own that shadows its class's. The backward pass of
that forward adds the weight's gradient to its sum in one matrix product, with beta = 1: the
gradient itself is never written. Where somebody would miss the gradient (hooks,
``torch.autograd.grad``, ``create_graph=True``) the backward hands it to autograd as ever; what is
no plain eager call with gradients (compilation, transforms, tensor subclasses) is left to the
layer's class altogether, and so is everything as soon as somebody has replaced torch's own forward
or the function that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["AccumulatingLayers"]

_PLAIN_TENSORS = (Tensor, nn.Parameter)

# Torch's own, unless a program had replaced them before this module was imported.
_own_linear = torch._C._nn.linear
_own_embedding = torch.embedding

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_num_function_modes = torch._C._len_torch_function_stack


def _is_plain_call(input: Tensor) -> bool:
    """Whether nothing but autograd and autocast stands between a call and its kernel."""
    if _is_compiling() or not _is_grad_enabled() or type(input) not in _PLAIN_TENSORS:
        return False
    if _transform() is not None:
        return False
    if _num_function_modes() == 0:
        return True
    # torch.set_default_device() is a mode as well, and minds nothing but factories.
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _is_torchs(function: Any, file: str | None, name: str) -> bool:
    """Whether a function is the one in torch's own file: wrappers copy everything but the code."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == file and code.co_name == name


def _linear_forward(
    linear: Callable[..., Tensor], index_of: dict[int, int]
) -> Callable[[nn.Linear, Tensor], Tensor]:
    own_forward = nn.Linear.forward

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        parameters = self._parameters
        weight = parameters.get("weight")
        index = index_of.get(id(weight), -1)
        if (
            index < 0
            or type(weight) not in _PLAIN_TENSORS
            or not weight.requires_grad
            or not _is_plain_call(input)
            or type(self).forward is not own_forward
            or F.linear is not _own_linear
        ):
            return type(self).forward(self, input)
        bias = parameters.get("bias")
        if (self.bias is not None) if bias is None else type(bias) not in _PLAIN_TENSORS:
            return type(self).forward(self, input)
        return linear(input, weight, bias, index, index_of.get(id(bias), -1))

    return forward


def _embedding_forward(
    embedding: Callable[..., Tensor], index_of: dict[int, int]
) -> Callable[[nn.Embedding, Tensor], Tensor]:
    own_forward = nn.Embedding.forward
    own_function = F.embedding

    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        index = index_of.get(id(weight), -1)
        if (
            index < 0
            or type(weight) not in _PLAIN_TENSORS
            or not weight.requires_grad
            or self.sparse
            or self.max_norm is not None
            or not _is_plain_call(input)
            or type(self).forward is not own_forward
            or F.embedding is not own_function
            or torch.embedding is not _own_embedding
        ):
            return type(self).forward(self, input)
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return embedding(input, weight, padding_idx, self.scale_grad_by_freq, index)

    return forward


def _eager_modules(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """All but what torch.compile runs: there Inductor fuses, and an armed forward would retrace."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return
    yield module
    for child in module.children():
        yield from _eager_modules(child, seen)


def _has_kernel(operator: str, device: torch.device) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"torch_ext::{operator}", key
    )


class AccumulatingLayers:
    """The layers of a model that can add to a core's sums themselves.

    Args:
        models: as they are called.
        core: the sums.
        index_of: place in the core of each parameter, by ``id``.
    """

    def __init__(self, models: list[nn.Module], core: Any, index_of: dict[int, int]) -> None:
        self._models = models
        self._core = core
        self._index_of = index_of
        self._device = ""
        self._forwards: list[tuple[dict[str, Any], MethodType]] = []

    def _find(self, device: torch.device) -> None:
        """The layers that have kernels where the parameters are now."""
        self._device = device.type
        # Bound methods: a copy of the module that is made meanwhile has its own weights' forward.
        self._forwards = []
        core, index_of = self._core, self._index_of
        kinds: dict[Any, Callable[..., Tensor]] = {}
        if (
            _has_kernel("linear_wgrad_", device)
            and _is_torchs(nn.Linear.forward, torch.nn.modules.linear.__file__, "forward")
            and isinstance(_own_linear, BuiltinFunctionType)
        ):
            kinds[nn.Linear.forward] = _linear_forward(core.linear, index_of)
        if (
            _has_kernel("embedding_wgrad_", device)
            and _is_torchs(nn.Embedding.forward, torch.nn.modules.sparse.__file__, "forward")
            and _is_torchs(F.embedding, F.__file__, "embedding")
            and isinstance(_own_embedding, BuiltinFunctionType)
        ):
            kinds[nn.Embedding.forward] = _embedding_forward(core.embedding, index_of)
        seen: set[int] = set()
        for model in self._models:
            for module in _eager_modules(model, seen):
                armed = kinds.get(type(module).forward)
                if armed is not None:
                    self._forwards.append((module.__dict__, MethodType(armed, module)))

    def arm(self, device: torch.device) -> None:
        if device.type != self._device:
            self._find(device)
        for attributes, forward in self._forwards:
            # Somebody else's forward (a hook library's) stays.
            attributes.setdefault("forward", forward)

    def disarm(self) -> None:
        for attributes, forward in self._forwards:
            if attributes.get("forward") is forward:
                del attributes["forward"]
