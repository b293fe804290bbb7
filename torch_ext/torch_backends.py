"""Which attention backends of torch's the program asks for, and where torch_ext has kernels."""

from __future__ import annotations

import torch

__all__ = ["kernels_exist_for", "torch_backend_chosen"]


def torch_backend_chosen(device_type: str) -> bool:
    """Whether the program restricts torch's attention backends, as inside sdpa_kernel(...).

    The rule of csrc/ops/sdpa_override/torch_backend_choice.cpp: sdpa_kernel(list) clears every flag
    that its list does not name, and the flags are global switches otherwise
    (torch.backends.cuda.enable_*_sdp).
    """
    return not (
        torch._C._get_overrideable_sdp_enabled()
        and torch._C._get_math_sdp_enabled()
        and torch._C._get_flash_sdp_enabled()
        and (device_type != "cuda" or torch._C._get_mem_efficient_sdp_enabled())
    )


def kernels_exist_for(device_type: str) -> bool:
    """Whether torch_ext has attention kernels for "cpu", "cuda" and so on."""
    if device_type not in ("cpu", "cuda"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "torch_ext::attention_forward", device_type.upper()
    )


# Read while torch.compile traces, like everything that decides a graph: a sdpa_kernel(...) context
# in the traced function is then entered already. The attribute is what
# torch.compiler.assume_constant_result sets, without importing Dynamo.
torch_backend_chosen.__dict__["_dynamo_marked_constant"] = True
kernels_exist_for.__dict__["_dynamo_marked_constant"] = True
