"""Sequences of a batch one behind the other, with their ends: nothing is padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackingCollator"]

_NAME = "torch_ext.data.PackingCollator"

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PackingCollator:
    """Makes one row of several sequences, for DataLoader's ``collate_fn``.

    Takes a list of dictionaries with ``input_ids`` and, where they differ, ``labels``: lists,
    arrays or tensors of (length,). Gives a dictionary of what Hugging Face's models take on packed
    rows:

    - ``input_ids``, ``position_ids`` (from 0 in each sequence), ``labels``: int64, (1, tokens)
    - ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32, (sequences + 1,), where each begins and ends
    - ``max_length_q``, ``max_length_k``: the longest one's tokens

    Labels are not shifted, as Hugging Face's losses expect. The first of each sequence is
    ``label_ignore_index``: no token of one document is learnt from the one before it.
    ``(batch["labels"] != -100).sum()`` is the weight for ``accumulator.micro_batch(weight=...)``.

    A sequence with an ``attention_mask`` brings only the tokens whose mask is not 0. Other entries
    are left out.

    Args:
        label_ignore_index: the label of tokens that are not learnt, as the loss has it.
    """

    def __init__(self, *, label_ignore_index: int = -100) -> None:
        if not isinstance(label_ignore_index, int) or isinstance(label_ignore_index, bool):
            raise TypeError(
                f"{_NAME}: label_ignore_index takes an integer, got "
                f"{type(label_ignore_index).__name__}"
            )
        self.label_ignore_index = label_ignore_index

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens: list[Tensor] = []
        labels: list[Tensor] = []
        for place, feature in enumerate(features):
            own_tokens, own_labels = self._sequence(place, feature)
            tokens.append(own_tokens)
            labels.append(own_labels)
        lengths = [len(own) for own in tokens]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        longest = max(lengths, default=0)
        return {
            "input_ids": _row(tokens),
            "position_ids": _row([torch.arange(length) for length in lengths]),
            "labels": _row(labels),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _sequence(self, place: int, feature: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if not isinstance(feature, Mapping) or "input_ids" not in feature:
            got = sorted(feature) if isinstance(feature, Mapping) else type(feature).__name__
            raise TypeError(f"{_NAME}: takes dictionaries with 'input_ids', got {got} at {place}")
        tokens = _vector(place, "input_ids", feature["input_ids"])
        given = feature.get("labels")
        labels = tokens.clone() if given is None else _vector(place, "labels", given).clone()
        mask = feature.get("attention_mask")
        entries = {"labels": labels}
        if mask is not None:
            entries["attention_mask"] = _vector(place, "attention_mask", mask)
        for name, entry in entries.items():
            if len(entry) != len(tokens):
                raise ValueError(
                    f"{_NAME}: {name} takes as many as input_ids, {len(tokens)}, got {len(entry)} "
                    f"at {place}"
                )
        if mask is not None:
            seen = entries["attention_mask"] != 0
            tokens, labels = tokens[seen], labels[seen]
        labels[:1] = self.label_ignore_index
        return tokens, labels


def _vector(place: int, name: str, values: Any) -> Tensor:
    """int64, (length,)."""
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1:
        raise ValueError(
            f"{_NAME}: {name} takes one dimension, got sizes {tuple(tensor.shape)} at {place}"
        )
    if tensor.numel() and tensor.dtype not in (*_INTEGERS, torch.bool):
        raise TypeError(f"{_NAME}: {name} takes integers, got {tensor.dtype} at {place}")
    return tensor.to(torch.int64)


def _row(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts or [torch.empty(0, dtype=torch.int64)]).unsqueeze(0)
