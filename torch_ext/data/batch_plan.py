"""The batches of one chunk of sequences: as many for each rank, of about the same cost."""

from __future__ import annotations

import itertools

from torch import Tensor

from torch_ext.data.sequence_packing import lists_of, packs_of

__all__ = ["batches_of_chunk"]

Batch = list[int]


def batches_of_chunk(
    lengths: Tensor, costs: list[float], capacity: int, totals: list[float]
) -> list[list[Batch]]:
    """Steps, each with a batch for every rank: places in ``lengths``, in rising order.

    Args:
        lengths: (n,). Where n is a multiple of the number of ranks, each sequence is in one batch;
            else a few of the cheapest may be in two.
        costs: n, of each sequence.
        capacity: tokens of a batch.
        totals: of each rank, what its batches have cost so far; they go on here.
    """
    ranks = len(totals)
    packs = [sorted(pack) for pack in lists_of(*packs_of(lengths, capacity))]
    _split_some(packs, costs, -(-len(packs) // ranks) * ranks)
    prices = [sum(costs[place] for place in pack) for pack in packs]
    # Ranks wait for each other: the batches of one step are of neighbouring cost.
    dearest_first = sorted(range(len(packs)), key=lambda p: (-prices[p], packs[p][0]))
    steps: list[list[Batch]] = []
    for start in range(0, len(packs), ranks):
        step: list[Batch] = [[]] * ranks
        # The dearest of a step to the rank that has cost least so far.
        cheapest = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, p in zip(cheapest, dearest_first[start : start + ranks], strict=True):
            step[rank] = packs[p]
            totals[rank] += prices[p]
        steps.append(step)
    # As near to the order of the sequences as packs can be.
    return sorted(steps, key=lambda step: min(batch[0] for batch in step))


def _split_some(packs: list[Batch], costs: list[float], wanted: int) -> None:
    """Cuts the packs of most sequences in two until there are as many as wanted; where each has one
    sequence, the cheapest come once more."""
    while len(packs) < wanted:
        largest = max(range(len(packs)), key=lambda p: (len(packs[p]), -p))
        if len(packs[largest]) == 1:
            cheapest = sorted(packs, key=lambda pack: (costs[pack[0]], pack[0]))
            packs += list(itertools.islice(itertools.cycle(cheapest), wanted - len(packs)))
            return
        pack = packs.pop(largest)
        half, left = 0, sum(costs[place] for place in pack) / 2
        while half < len(pack) - 1 and (half == 0 or costs[pack[half]] <= left):
            left -= costs[pack[half]]
            half += 1
        packs += [pack[:half], pack[half:]]
