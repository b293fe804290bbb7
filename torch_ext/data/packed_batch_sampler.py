"""Batches of packed sequences, the same number and the same cost on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from torch_ext.data.batch_plan import batches_of_chunk
from torch_ext.data.sequence_packing import checked_count, checked_lengths

__all__ = ["PackedBatchSampler"]

_NAME = "PackedBatchSampler"

# Tokens of a sequence, counted as the work of its tokens: that of its pairs of tokens is as much at
# 4096 tokens. A layer of width d computes some 24 d^2 for a token and 4 d for a pair it attends to.
_PAIRS_OF_A_TOKEN = 2048.0

_GOLDEN_RATIO = 0x1E3779B97F4A7C15  # odd, below 2^62


def _causal_cost(length: int) -> float:
    return length + length * (length + 1) / 2 / _PAIRS_OF_A_TOKEN


class PackedBatchSampler(Sampler[list[int]]):
    """Each batch: the indices of sequences that fill ``capacity`` tokens together.

        sampler = torch_ext.data.PackedBatchSampler(lengths, 4096, rank=rank, world_size=world_size)
        loader = DataLoader(documents, batch_sampler=sampler, collate_fn=PackingCollator())
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                ...

    Every sequence is in one batch of one rank in each epoch; where the number of sequences is no
    multiple of ``world_size``, fewer than ``world_size`` may come twice, at the epoch's end. Ranks
    get the same number of batches; their n-th batches cost about the same, and so do all batches
    of a rank together. The order is the epoch's, but within ``buffer`` sequences.

    Args:
        lengths: tokens of each sequence, from 0 to ``capacity``: a list, a NumPy array or a tensor.
        capacity: tokens of a batch at most.
        shuffle: another order in each epoch; else that of ``lengths``.
        seed: of the orders. The same on every rank, as are all arguments but ``rank``.
        rank: this process, from 0 to ``world_size - 1``.
        world_size: how many processes there are.
        buffer: sequences that are packed at a time. More of them fill batches better, and move
            sequences further from their place in the order.
        cost: of one sequence, by its length; a batch costs what its sequences do. None: its
            tokens, and its pairs under a causal mask, ``n + n (n + 1) / 2 / 2048``. With a sliding
            window of ``w``: ``lambda n: n + n * min(n, w) / 2048``.

    Raises:
        TypeError, ValueError: naming the argument, what it takes and what it got.
    """

    def __init__(
        self,
        lengths: Any,
        capacity: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buffer: int = 10000,
        cost: Callable[[int], float] | None = None,
    ) -> None:
        self._capacity = checked_count(_NAME, "capacity", capacity)
        self._lengths = checked_lengths(_NAME, lengths, self._capacity)
        self._shuffle = bool(shuffle)
        self._seed = checked_count(_NAME, "seed", seed, least=0)
        self._world_size = checked_count(_NAME, "world_size", world_size)
        self._rank = checked_count(_NAME, "rank", rank, least=0)
        if self._rank >= self._world_size:
            raise ValueError(
                f"torch_ext.data.{_NAME}: rank takes a number below world_size, "
                f"{self._world_size}, got {self._rank}"
            )
        self._buffer = checked_count(_NAME, "buffer", buffer)
        count = self._lengths.numel()
        if count > self._buffer < 2 * self._world_size - 1:
            raise ValueError(
                f"torch_ext.data.{_NAME}: buffer takes at least 2 * world_size - 1 sequences, "
                f"{2 * self._world_size - 1}, got {self._buffer}: every rank gets a batch of each"
            )
        costs = _costs(self._lengths, cost)
        self._costs: list[float] = costs.tolist()
        self._checksum = _checksum(self._lengths, costs)
        self._epoch = 0
        self._start = 0  # of the next pass over the batches
        self._handed_out = 0  # of the newest pass
        self._batches: list[list[int]] | None = None

    @property
    def epoch(self) -> int:
        """As :meth:`set_epoch` was told last."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch, as with DistributedSampler. The epoch of a loaded state goes on where
        it was; another one starts at its first batch."""
        epoch = checked_count(_NAME, "epoch", epoch, least=0)
        if epoch != self._epoch:
            self._epoch = epoch
            self._start = self._handed_out = 0
            self._batches = None

    def __len__(self) -> int:
        """Batches of this epoch, the same on every rank; after a resume too."""
        return len(self._planned())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._planned()
        first, self._start = self._start, 0
        self._handed_out = first
        for number in range(first, len(batches)):
            self._handed_out = number + 1
            yield list(batches[number])

    def state_dict(self, batches: int | None = None) -> dict[str, int]:
        """Where this epoch is, and which batches it has.

        Args:
            batches: how many the training loop has had in this epoch. A DataLoader with workers
                asks for batches ahead of time, which only the loop can tell. None: as many as were
                handed out.
        """
        done = self._handed_out
        if batches is not None:
            done = checked_count(_NAME, "batches", batches, least=0)
        return self._identity() | {"epoch": self._epoch, "batches": done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on behind the batches of a state, with the batches that would have come.

        Raises:
            ValueError: for the state of another data set, or of other arguments, naming them; the
                sampler stays as it was.
        """
        identity = self._identity()
        expected = identity.keys() | {"epoch", "batches"}
        if not isinstance(state_dict, dict) or state_dict.keys() != expected:
            got = sorted(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(
                f"torch_ext.data.{_NAME}: load_state_dict() takes what state_dict() gave, with "
                f"{sorted(expected)}, got {got}"
            )
        for key, value in identity.items():
            if state_dict[key] != value:
                raise ValueError(
                    f"torch_ext.data.{_NAME}: load_state_dict() takes the state of the same "
                    f"batches, with {key} {value}, got {state_dict[key]}"
                )
        epoch = checked_count(_NAME, "epoch", state_dict["epoch"], least=0)
        done = checked_count(_NAME, "batches", state_dict["batches"], least=0)
        batches = self._plan(epoch)
        if done > len(batches):
            raise ValueError(
                f"torch_ext.data.{_NAME}: load_state_dict() 'batches' takes at most the epoch's, "
                f"{len(batches)}, got {done}"
            )
        self._epoch, self._batches = epoch, batches
        self._start = self._handed_out = done

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None}  # made again, the same

    def _identity(self) -> dict[str, int]:
        """All that the batches follow from, but the epoch and the rank."""
        return {
            "sequences": self._lengths.numel(),
            "checksum": self._checksum,
            "capacity": self._capacity,
            "shuffle": int(self._shuffle),
            "seed": self._seed,
            "world_size": self._world_size,
            "buffer": self._buffer,
        }

    def _planned(self) -> list[list[int]]:
        if self._batches is None:
            self._batches = self._plan(self._epoch)
        return self._batches

    def _chunk_ends(self, count: int) -> list[int]:
        """Where chunks of at most ``buffer`` sequences end, but the last.

        Each has as many for every rank, the last one also those left over. They are of about one
        size: a short one at the end would have badly filled batches alone.
        """
        if count <= self._buffer:
            return []
        ranks = self._world_size
        steps = count // ranks  # of one sequence for every rank
        chunks = -(-steps // ((self._buffer - ranks + 1) // ranks))
        return [steps * chunk // chunks * ranks for chunk in range(1, chunks)]

    def _plan(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch."""
        count = self._lengths.numel()
        generator = torch.Generator().manual_seed(_mixed(self._seed, epoch))
        order = torch.arange(count)
        if self._shuffle:
            order = torch.randperm(count, generator=generator)
        chunks = order.tensor_split(self._chunk_ends(count)) if count else ()
        batches: list[list[int]] = []
        totals = [0.0] * self._world_size
        for chunk in chunks:
            sequences = chunk.tolist()
            costs = [self._costs[sequence] for sequence in sequences]
            steps = batches_of_chunk(self._lengths[chunk], costs, self._capacity, totals)
            places: Sequence[int] = range(len(steps))
            if self._shuffle:
                places = torch.randperm(len(steps), generator=generator).tolist()
            for place in places:
                batches.append([sequences[at] for at in steps[place][self._rank]])
        return batches


def _mixed(seed: int, epoch: int) -> int:
    """Of every pair another number, where seed + epoch has one for several."""
    return (seed * _GOLDEN_RATIO + epoch * 0x517CC1B727220A95) % (1 << 63)


def _costs(lengths: Tensor, cost: Callable[[int], float] | None) -> Tensor:
    """float64, (n,)."""
    if cost is None:
        cost = _causal_cost
    elif not callable(cost):
        raise TypeError(
            f"torch_ext.data.{_NAME}: cost takes a function of a sequence's length, or None, got "
            f"{type(cost).__name__}"
        )
    distinct, places = lengths.unique(return_inverse=True)
    values = torch.tensor(
        [float(cost(length)) for length in distinct.tolist()], dtype=torch.float64
    )
    wrong = ~(values >= 0.0) | values.isinf()
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"torch_ext.data.{_NAME}: cost takes a function that gives finite numbers >= 0, got "
            f"{values[at].item()} for {distinct[at].item()} tokens"
        )
    return values[places]


def _checksum(lengths: Tensor, costs: Tensor) -> int:
    """Another one where a number is another, or stands elsewhere; modulo 2^63."""
    factors = torch.arange(1, lengths.numel() + 1) * _GOLDEN_RATIO | 1
    parts = lengths * factors + costs.view(torch.int64) * (factors ^ 2)
    return int(parts.sum()) % (1 << 63)
