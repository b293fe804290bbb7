"""When attention stays torch's: its backends, devices, and graphs that other programs run."""

from __future__ import annotations

import sys

import torch

from torch_ext import _C

__all__ = [
    "device_is_taken",
    "exports_to_onnx",
    "forward_mode_is_on",
    "graph_is_for_others",
    "torch_backend_chosen",
]

# Not imported, they export nothing; is_in_onnx_export() imports them.
_ONNX_EXPORTERS = (
    "torch.onnx._internal.exporter._flags",
    "torch.onnx._internal.torchscript_exporter._globals",
)


def torch_backend_chosen(device_type: str) -> bool:
    """Whether sdpa_kernel(...) leaves out a backend that torch has on this device.

    The rule of csrc/ops/sdpa_override/torch_backend_choice.cpp: sdpa_kernel(list) clears every flag
    that its list does not name, "overrideable" too, which nothing else clears. The other flags are
    also global switches for GPUs (torch.backends.cuda.enable_*_sdp).
    """
    cpu_has = torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()
    if device_type == "cuda":
        return not (cpu_has and torch._C._get_mem_efficient_sdp_enabled())
    return not (cpu_has or torch._C._get_overrideable_sdp_enabled())


def device_is_taken(device_type: str) -> bool:
    """Whether the drop-in takes calls on "cpu", "cuda" and so on."""
    if device_type == "cuda":
        return _C.is_cuda_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
            "torch_ext::attention_forward", "CUDA"
        )
    return device_type == "cpu"


def exports_to_onnx() -> bool:
    """Whether one of torch's ONNX exporters is at work."""
    return any(name in sys.modules for name in _ONNX_EXPORTERS) and torch.onnx.is_in_onnx_export()


def forward_mode_is_on() -> bool:
    """Whether forward-mode AD may differentiate through what is called now."""
    return torch.autograd.forward_ad._current_level >= 0


def graph_is_for_others() -> bool:
    """Whether the graph being recorded is to run in programs that do not know torch_ext."""
    return torch.jit.is_tracing() or exports_to_onnx()


# Read while torch.compile traces, like everything that decides a graph: a sdpa_kernel(...) context
# in the traced function is then entered already. The attribute is what
# torch.compiler.assume_constant_result sets, without importing Dynamo.
for _question in (
    torch_backend_chosen,
    device_is_taken,
    forward_mode_is_on,
    graph_is_for_others,
):
    _question.__dict__["_dynamo_marked_constant"] = True
