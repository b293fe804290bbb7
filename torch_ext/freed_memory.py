"""Tensors whose storage was freed under them, which torch's own conversions read all the same."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_readable"]


def check_readable(tensor: Tensor, place: str) -> None:
    """Raises where a tensor spans more memory than its storage has.

    Args:
        tensor: dense, and no subclass's.
        place: its name, for the message.
    """
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    found, spanned = tensor.untyped_storage().nbytes(), (last + 1) * tensor.itemsize
    if found < spanned:
        raise RuntimeError(
            f"torch_ext.GradientAccumulator: {place} takes a tensor with memory, got one whose "
            f"storage was freed or shrunk: it has {found} of the {spanned} bytes that sizes and "
            "strides span"
        )
