"""torch_ext.data.pack_sequences: packs, their input types, and what it refuses."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_ext.data import pack_sequences

_CASES = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(0, capacity), max_size=120))
)


@settings(deadline=None, max_examples=150)
@given(_CASES, st.one_of(st.none(), st.integers(1, 5)))
def test_every_sequence_is_in_one_pack_that_holds_it(
    case: tuple[int, list[int]], max_sequences: int | None
) -> None:
    capacity, lengths = case
    packs = pack_sequences(lengths, capacity, max_sequences=max_sequences)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert 0 < len(pack) <= (max_sequences or len(lengths))
        assert sum(lengths[index] for index in pack) <= capacity
    assert packs == pack_sequences(lengths, capacity, max_sequences=max_sequences)


@settings(deadline=None, max_examples=100)
@given(_CASES)
def test_packs_are_few(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    packs = pack_sequences(lengths, capacity)
    # Johnson's bound, of a lower bound of the fewest packs possible; no two that fit together.
    fewest = max(
        math.ceil(sum(lengths) / capacity), sum(2 * length > capacity for length in lengths)
    )
    assert len(packs) <= 11 * max(fewest, bool(lengths)) / 9 + 1 or len(packs) <= 2 * fewest
    full = sorted(sum(lengths[index] for index in pack) for pack in packs)
    assert len(full) < 2 or full[0] + full[1] > capacity


@settings(deadline=None, max_examples=60)
@given(_CASES, st.sampled_from([7, 10**6, 2**62 // 300]))
def test_packs_do_not_depend_on_the_unit_of_length(case: tuple[int, list[int]], unit: int) -> None:
    """Large capacities are packed by another table."""
    capacity, lengths = case
    scaled = [length * unit for length in lengths]
    assert pack_sequences(scaled, capacity * unit) == pack_sequences(lengths, capacity)


def test_a_corpus_fills_its_packs() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(50_000).log_normal_(5.5, 1.0, generator=generator).long().clamp(1, 4096)
    packs = pack_sequences(lengths, 4096)
    assert int(lengths.sum()) >= 0.99 * 4096 * len(packs)


_LENGTHS = [3, 5, 2, 8, 0, 5, 1]


@pytest.mark.parametrize(
    "lengths",
    [
        _LENGTHS,
        tuple(_LENGTHS),
        iter(_LENGTHS),
        [np.int32(length) for length in _LENGTHS],
        torch.tensor(_LENGTHS),
        torch.tensor(_LENGTHS, dtype=torch.uint8),
        torch.tensor([[length, 99] for length in _LENGTHS])[:, 0],
        *(np.array(_LENGTHS, dtype=dtype) for dtype in ("int64", "int16", "uint16", "uint64")),
        np.array(_LENGTHS)[::-1][::-1],
    ],
    ids=lambda lengths: f"{type(lengths).__name__} {getattr(lengths, 'dtype', '')}",
)
def test_lists_arrays_and_tensors_are_the_same(lengths: Any) -> None:
    assert pack_sequences(lengths, 8) == [[3], [1, 2, 6, 4], [5, 0]]


@pytest.mark.parametrize("empty", [[], torch.empty(0), np.array([])])
def test_no_sequences_are_no_packs(empty: Any) -> None:
    assert pack_sequences(empty, 8) == []


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ([1, 9], {}, ValueError, r"lengths takes numbers from 0 to capacity, 8, got 9 at 1"),
        ([1, 2, -3], {}, ValueError, r"lengths takes numbers from 0 to capacity, 8, got -3 at 2"),
        (np.array([1, 2**63], dtype="uint64"), {}, ValueError, r"got 9223372036854775808 at 1"),
        ([1.0], {}, TypeError, r"lengths takes integers, got torch\.float32"),
        ([True], {}, TypeError, r"lengths takes integers, got torch\.bool"),
        (torch.ones(3), {}, TypeError, r"lengths takes integers, got torch\.float32"),
        (torch.ones(1, 3, dtype=torch.long), {}, ValueError, r"one dimension, got sizes \(1, 3\)"),
        ([[1], [2]], {}, ValueError, r"lengths takes one dimension, got sizes \(2, 1\)"),
        ([[1], [2, 3]], {}, TypeError, r"lengths takes a list, an array or a tensor of integers"),
        (["a"], {}, TypeError, r"lengths takes a list, an array or a tensor of integers"),
        ("12", {}, TypeError, r"lengths takes a list, .* got str"),
        (5, {}, TypeError, r"lengths takes a list, .* got int"),
        ([2**70], {}, TypeError, r"lengths takes a list, an array or a tensor of integers"),
        ([1], {"capacity": 0}, ValueError, r"capacity takes an integer >= 1, got 0"),
        ([1], {"capacity": 8.0}, TypeError, r"capacity takes an integer >= 1, got float"),
        ([1], {"max_sequences": 0}, ValueError, r"max_sequences takes an integer >= 1, got 0"),
        ([1], {"max_sequences": True}, TypeError, r"max_sequences takes an integer >= 1, got bool"),
    ],
)
def test_refusals_name_the_argument(
    lengths: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"torch_ext\.data\.pack_sequences: .*" + message):
        pack_sequences(lengths, **({"capacity": 8} | options))


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        (torch.tensor([1, 9]), 8, "lengths takes numbers from 0 to capacity, 8, got 9 at 1"),
        (torch.ones(2), 8, "lengths takes integers, got Float"),
        (torch.ones(2, 2).long(), 8, r"lengths takes one dimension, got sizes \[2, 2\]"),
        (torch.tensor([1]), 0, "capacity takes a number >= 1, got 0"),
    ],
)
def test_the_operator_checks_too(lengths: torch.Tensor, capacity: int, message: str) -> None:
    with pytest.raises(RuntimeError, match="torch_ext::pack_sequences: " + message):
        torch.ops.torch_ext.pack_sequences(lengths, capacity)


def test_other_threads_run_meanwhile() -> None:
    lengths = torch.arange(1 << 20) % 4000
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # Python's lock changes hands only where it is given away
    try:
        for _ in range(20):  # the other thread may start late
            ran: list[bool] = []
            start = threading.Event()
            thread = threading.Thread(target=lambda: (start.wait(), ran.append(True)))  # noqa: B023
            thread.start()
            start.set()
            torch.ops.torch_ext.pack_sequences(lengths, 4096)
            ran_meanwhile = bool(ran)
            thread.join()
            if ran_meanwhile:
                return
    finally:
        sys.setswitchinterval(before)
    raise AssertionError("no other thread ran while sequences were packed")
