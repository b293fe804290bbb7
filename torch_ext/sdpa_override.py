"""The drop-in switch: torch's attention runs torch_ext's fused operators while it is on."""

from __future__ import annotations

import atexit
import contextlib
from types import TracebackType

from torch_ext import (
    _C,
    causal_bias,
    compiled_code,
    jagged_attention,
    multi_head_routing,
    torch_backends,
)

__all__ = ["disable", "enable", "enabled", "is_enabled"]


def enable(cuda: bool = False) -> None:
    """Runs torch's attention fused from here on, in the whole process.

    That is ``F.scaled_dot_product_attention`` and all that is built on it: ``nn.Transformer``,
    ``nn.TransformerEncoder``, ``nn.TransformerDecoder``, ``nn.MultiheadAttention``, most models, in
    training and inference, their inference fast paths included, eager and under ``torch.compile``,
    on the CPU. What torch_ext does not take (nested, sparse, quantized or complex tensors) keeps
    torch's own kernels, and so do calls inside ``torch.nn.attention.sdpa_kernel(...)`` whose list
    leaves out a backend that torch has on the device: on the CPU, FLASH_ATTENTION or MATH. The
    switches ``torch.backends.cuda.enable_*_sdp`` are for GPUs: the CPU does not follow them.
    Graphs of ``torch.jit.trace`` and of the ONNX exporters are torch's.

    Inside ``enabled()`` it changes that scope only. A function compiled while the drop-in was off
    is compiled anew when it is next called, and the other way round; both versions stay cached.

    Args:
        cuda: whether CUDA tensors run torch_ext's kernels too, in a build that has them. No GPU has
            run these kernels yet; without it CUDA tensors are torch's.
    """
    with compiled_code.compile_lock():
        _C.enable(cuda)


def disable() -> None:
    """Gives torch's attention back to torch: no override, no routed module is left behind."""
    with compiled_code.compile_lock():
        _C.disable()


def is_enabled() -> bool:
    """Whether torch's attention runs fused now."""
    return _C.is_enabled()


class enabled(contextlib.ContextDecorator):  # noqa: N801
    """Context manager and decorator: fused attention inside, afterwards what was there before.

    Scopes nest, also ``enabled(False)`` inside ``enabled()``. The switch is the process's: other
    threads see it too, and where scopes of several threads overlap the one opened last decides.

    Args:
        on: whether the drop-in is on (the default) or off inside.
        cuda: as in ``enable()``.
    """

    def __init__(self, on: bool = True, *, cuda: bool = False) -> None:
        self._on = on
        self._cuda = cuda
        self._scopes: list[_C.EnabledScope] = []

    def __enter__(self) -> enabled:
        with compiled_code.compile_lock():
            self._scopes.append(_C.EnabledScope(self._on, self._cuda))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with compiled_code.compile_lock():
            self._scopes.pop().close()


def _state_changed(on: bool, cuda: bool) -> None:
    compiled_code.state_changed(on, cuda)
    if on:
        multi_head_routing.install()
        causal_bias.install()
        jagged_attention.install()
    else:
        jagged_attention.remove()
        causal_bias.remove()
        multi_head_routing.remove()


# Called for C++'s enable() and disable() too.
_C.set_override_listener(_state_changed)
_C.set_onnx_check(torch_backends.exports_to_onnx)
atexit.register(_C.set_override_listener, None)
atexit.register(_C.set_onnx_check, None)

# Dynamo: a question answered while tracing (its guard is compiled_code's), and switches that no
# graph can hold. The attributes are what torch.compiler's decorators set, without importing Dynamo.
is_enabled.__dict__["_dynamo_marked_constant"] = True
for _switch in (enable, disable, enabled.__enter__, enabled.__exit__):
    _switch.__dict__["_torchdynamo_disable"] = True
    _switch.__dict__["_torchdynamo_disable_msg"] = (
        "torch_ext's drop-in is switched outside compiled code"
    )
