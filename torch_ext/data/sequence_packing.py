"""Sequences into packs of one capacity."""

from __future__ import annotations

import contextlib
import gc
import itertools
from array import array
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

__all__ = ["checked_count", "checked_lengths", "lists_of", "pack_sequences", "packs_of"]

_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def pack_sequences(
    lengths: Any, capacity: int, *, max_sequences: int | None = None
) -> list[list[int]]:
    """Puts sequences into packs of at most ``capacity`` tokens, none cut, none left out.

    Best fit decreasing: the longest sequence first, each into the fullest pack that still takes it.
    O(n log n), in C++ without Python's lock; the same packs for the same lengths, everywhere.

    Args:
        lengths: tokens of each sequence, from 0 to ``capacity``: a list, a NumPy array or a tensor
            of integers.
        capacity: tokens of a pack, >= 1.
        max_sequences: in one pack; None: any number.

    Returns:
        Of each pack, the places of its sequences in ``lengths``.

    Raises:
        TypeError, ValueError: naming the argument, what it takes and what it got.
    """
    name = "pack_sequences"
    capacity = checked_count(name, "capacity", capacity)
    if max_sequences is not None:
        max_sequences = checked_count(name, "max_sequences", max_sequences)
    indices, offsets = packs_of(checked_lengths(name, lengths, capacity), capacity, max_sequences)
    return lists_of(indices, offsets)


def packs_of(
    lengths: Tensor, capacity: int, max_sequences: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same of checked lengths: indices, and where each pack's begin and end."""
    packed: tuple[Tensor, Tensor] = torch.ops.torch_ext.pack_sequences(
        lengths, capacity, max_sequences=max_sequences
    )
    return packed


def lists_of(indices: Tensor, offsets: Tensor) -> list[list[int]]:
    """Of each pack, its indices."""
    flat, ends = indices.tolist(), offsets.tolist()
    with _no_collection():
        return [flat[start:end] for start, end in itertools.pairwise(ends)]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection looks through all lists of numbers again and again, as they grow in
    number: four times as long as to make them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def checked_count(name: str, argument: str, value: Any, least: int = 1) -> int:
    """An integer, NumPy's too, that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"torch_ext.data.{name}: {argument} takes an integer >= {least}, got "
            f"{type(value).__name__}"
        )
    if value < least:
        raise ValueError(
            f"torch_ext.data.{name}: {argument} takes an integer >= {least}, got {value}"
        )
    return int(value)


def checked_lengths(name: str, lengths: Any, capacity: int) -> Tensor:
    """int64, (n,), on the CPU, each from 0 to capacity."""
    tensor = _tensor_of(name, lengths)
    if tensor.dim() != 1:
        raise ValueError(
            f"torch_ext.data.{name}: lengths takes one dimension, got sizes {tuple(tensor.shape)}"
        )
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"torch_ext.data.{name}: lengths takes integers, got {tensor.dtype}")
    checked = tensor.detach().to("cpu", torch.int64)  # beyond int64 they come out negative
    wrong = (checked < 0) | (checked > capacity)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"torch_ext.data.{name}: lengths takes numbers from 0 to capacity, {capacity}, got "
            f"{tensor[at].item()} at {at}"
        )
    return checked


def _tensor_of(name: str, lengths: Any) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Iterable):
        raise TypeError(
            f"torch_ext.data.{name}: lengths takes a list, an array or a tensor of integers, got "
            f"{type(lengths).__name__}"
        )
    try:
        if hasattr(lengths, "__array__"):
            return torch.as_tensor(lengths)
        numbers = list(lengths)
        if numbers and type(numbers[0]) is int:
            with contextlib.suppress(TypeError, OverflowError):  # not integers alone
                return torch.frombuffer(array("q", numbers), dtype=torch.int64)
        return torch.as_tensor(numbers)  # its values say which dtype it has
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"torch_ext.data.{name}: lengths takes a list, an array or a tensor of integers: "
            f"{error}"
        ) from error
