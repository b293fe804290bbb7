"""torch_ext.data.PackedBatchSampler: batches over ranks, in DataLoaders, and resumed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torch_ext.data import PackedBatchSampler, PackingCollator


def _lengths(count: int = 500, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count).log_normal_(3.0, 1.0, generator=generator).long().clamp(1, 128)


def _ranks(lengths: Any, world_size: int, capacity: int = 128, **options: Any) -> list[Any]:
    return [
        PackedBatchSampler(lengths, capacity, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 40), max_size=150),
    st.integers(1, 4),
    st.integers(1, 60),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_sequence_once_an_epoch_and_as_many_batches_on_every_rank(
    lengths: list[int], world_size: int, buffer: int, shuffle: bool, epoch: int
) -> None:
    if len(lengths) > buffer < 2 * world_size - 1:
        return
    samplers = _ranks(lengths, world_size, 40, buffer=buffer, shuffle=shuffle)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    batches = [batch for rank in ranks for batch in rank]
    found = [index for batch in batches for index in batch]
    assert set(found) == set(range(len(lengths)))
    # Twice only where numbers do not divide: five sequences that fill a batch each, on four ranks.
    assert len(found) - len(lengths) < max(1, world_size if len(lengths) % world_size else 1)
    assert all(batch and sum(lengths[index] for index in batch) <= 40 for batch in batches)
    assert {len(rank) for rank in ranks} == {len(sampler) for sampler in samplers}
    assert len({len(rank) for rank in ranks}) == 1
    if not shuffle:
        # No sequence comes before one that is a buffer or more in front of it.
        first_left = len(lengths)
        for step in reversed(list(zip(*ranks, strict=True))):
            assert all(index - first_left < buffer for batch in step for index in batch)
            first_left = min(first_left, *(index for batch in step for index in batch))


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("cost", [None, lambda n: n + n * min(n, 16) / 64, lambda n: n * n])
def test_ranks_cost_the_same(world_size: int, cost: Any) -> None:
    lengths = _lengths(4000).tolist()
    price = cost or (lambda n: n + n * (n + 1) / 2 / 2048)
    ranks = [
        [sum(price(lengths[index]) for index in batch) for batch in sampler]
        for sampler in _ranks(lengths, world_size, buffer=1000, cost=cost)
    ]
    totals = [sum(rank) for rank in ranks]
    assert max(totals) - min(totals) <= max(max(rank) for rank in ranks)
    # What ranks wait for the dearest batch of each step, of all that they compute.
    waited = sum(max(step) * world_size - sum(step) for step in zip(*ranks, strict=True))
    assert waited <= 0.05 * sum(totals)


def test_sequences_come_twice_only_where_they_must() -> None:
    for lengths, repeated in (
        ([128] * 5, 3),
        ([128] * 8, 0),
        ([64] * 5, 0),
        ([3], 3),
        (_lengths(), 0),
    ):
        ranks = [list(sampler) for sampler in _ranks(lengths, 4)]
        found = [index for rank in ranks for batch in rank for index in batch]
        assert len(found) == len(lengths) + repeated


def test_batches_are_full() -> None:
    lengths = _lengths(20_000)
    sampler = PackedBatchSampler(lengths, 128, buffer=5000)
    assert int(lengths.sum()) >= 0.99 * 128 * len(sampler)


def test_orders_follow_seed_and_epoch() -> None:
    def batches(epoch: int, **options: Any) -> list[list[int]]:
        sampler = PackedBatchSampler(_lengths(), 128, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [batches(epoch, seed=seed) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(one != other for k, one in enumerate(orders) for other in orders[:k])
    assert batches(1, seed=0) == orders[1]
    assert batches(0, shuffle=False) == batches(5, shuffle=False)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_resumes_in_the_middle(through: Any) -> None:
    for rank in range(2):
        whole = PackedBatchSampler(_lengths(), 128, rank=rank, world_size=2, buffer=100)
        whole.set_epoch(3)
        expected = list(whole)
        for done in (0, 1, 7, len(expected) - 1, len(expected)):
            interrupted = PackedBatchSampler(_lengths(), 128, rank=rank, world_size=2, buffer=100)
            interrupted.set_epoch(3)
            iterator = iter(interrupted)
            for _ in range(done):
                next(iterator)
            resumed = PackedBatchSampler(_lengths(), 128, rank=rank, world_size=2, buffer=100)
            resumed.load_state_dict(through(interrupted.state_dict()))
            assert resumed.state_dict() == interrupted.state_dict()
            resumed.set_epoch(3)  # as loops do, of the epoch that goes on
            assert resumed.epoch == 3
            assert list(resumed) == expected[done:]
            assert list(resumed) == expected  # and whole afterwards
            assert list(through(interrupted)) == expected
            resumed.set_epoch(4)
            whole.set_epoch(4)
            assert list(resumed) == list(whole)
            whole.set_epoch(3)


class _Documents(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((int(self.lengths[index]),), index)}


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)], ids=str)
def test_in_a_data_loader(workers: int, persistent: bool) -> None:
    lengths = _lengths(200)
    sampler = PackedBatchSampler(lengths, 128)
    loader = DataLoader(
        _Documents(lengths),
        batch_sampler=sampler,
        collate_fn=PackingCollator(),
        num_workers=workers,
        persistent_workers=persistent,
    )
    assert len(loader) == len(sampler)

    def epoch(number: int) -> list[list[int]]:
        sampler.set_epoch(number)
        return [batch["input_ids"].unique_consecutive().tolist() for batch in loader]

    first, second = epoch(0), epoch(1)
    for batches in (first, second):
        assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert first != second
    # Workers are ahead of the loop, which alone knows how far it is.
    sampler.set_epoch(0)
    for done, batch in enumerate(loader, start=1):
        if done == 5:
            assert batch["input_ids"].unique_consecutive().tolist() == first[4]
            state = sampler.state_dict(batches=done)
            break
    resumed = PackedBatchSampler(lengths, 128)
    resumed.load_state_dict(state)
    assert list(resumed) == first[5:]


def test_no_sequences_are_no_batches() -> None:
    for sampler in _ranks([], 3):
        assert len(sampler) == 0
        assert list(sampler) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [129]}, ValueError, "lengths takes numbers from 0 to capacity, 128, got 129"),
        ({"capacity": "128"}, TypeError, "capacity takes an integer >= 1, got str"),
        (
            {"rank": 2, "world_size": 2},
            ValueError,
            "rank takes a number below world_size, 2, got 2",
        ),
        ({"rank": -1}, ValueError, "rank takes an integer >= 0, got -1"),
        ({"world_size": 0}, ValueError, "world_size takes an integer >= 1, got 0"),
        ({"buffer": 0}, ValueError, "buffer takes an integer >= 1, got 0"),
        ({"buffer": 6, "world_size": 4}, ValueError, "at least 2 . world_size - 1 sequences, 7"),
        ({"seed": -1}, ValueError, "seed takes an integer >= 0, got -1"),
        ({"cost": 3}, TypeError, "cost takes a function of a sequence's length, or None, got int"),
        ({"cost": lambda n: -n}, ValueError, r"finite numbers >= 0, got -1\.0 for 1 tokens"),
        ({"cost": lambda n: float("nan")}, ValueError, "finite numbers >= 0, got nan"),
    ],
)
def test_refusals_name_the_argument(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"lengths": [1] * 20, "capacity": 128} | options
    with pytest.raises(error, match=r"torch_ext\.data\.PackedBatchSampler: .*" + message):
        PackedBatchSampler(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the same batches, with seed 0, got 1"),
        ({"buffer": 77}, "the same batches, with buffer 10000, got 77"),
        ({"world_size": 2}, "the same batches, with world_size 1, got 2"),
        ({"shuffle": False}, "the same batches, with shuffle 1, got 0"),
        ({"capacity": 256}, "the same batches, with capacity 128, got 256"),
        ({"lengths": _lengths(499)}, "the same batches, with sequences 500, got 499"),
        ({"lengths": _lengths().flip(0)}, "the same batches, with checksum"),
        ({"cost": lambda n: n}, "the same batches, with checksum"),
    ],
)
def test_the_state_of_other_batches_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = PackedBatchSampler(_lengths(), 128)
    iterator = iter(sampler)
    next(iterator)
    other = PackedBatchSampler(**({"lengths": _lengths(), "capacity": 128} | change))
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(other.state_dict())
    assert sampler.state_dict()["batches"] == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "takes what state_dict\\(\\) gave, .* got NoneType"),
        ({"epoch": 0}, r"takes what state_dict\(\) gave, .* got \['epoch'\]"),
        ({"batches": 10**6}, "'batches' takes at most the epoch's"),
        ({"batches": -1}, "batches takes an integer >= 0, got -1"),
    ],
)
def test_a_broken_state_is_refused(state: Any, message: str) -> None:
    sampler = PackedBatchSampler(_lengths(), 128)
    if state and "batches" in state:
        state = sampler.state_dict() | state
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
