"""Small models, micro-batches of unequal sizes, and one large batch to compare windows with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.optim import Optimizer

import torch_ext

VOCABULARY = 23
WIDTH = 12

Batch = tuple[Tensor, Tensor]


class TiedModel(nn.Module):
    """An embedding that is the output layer too, a linear layer used twice, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq)
        hidden = self.norm(self.embedding(tokens))
        hidden = hidden + self.twice(F.gelu(self.twice(hidden)))
        hidden = hidden + self.convolution(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(hidden)


def token_batches(sizes: Sequence[int], seed: int = 0, seq: int = 5) -> list[Batch]:
    """Micro-batches of that many sequences: tokens and targets, each (size, seq)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(VOCABULARY, (size, seq), generator=generator),
            torch.randint(VOCABULARY, (size, seq), generator=generator),
        )
        for size in sizes
    ]


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    tokens, targets = batch
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def one_large_batch(batches: Sequence[Batch]) -> Batch:
    return torch.cat([tokens for tokens, _ in batches]), torch.cat([t for _, t in batches])


def accumulate(
    accumulator: torch_ext.GradientAccumulator,
    batches: Sequence[Batch],
    model: nn.Module | None = None,
) -> None:
    """One micro-batch after the other, weighted by tokens."""
    model = accumulator.model if model is None else model
    for batch in batches:
        with accumulator.micro_batch(weight=batch[1].numel()):
            loss_sum(model, batch).backward()


def stock_window(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], max_norm: float | None = None
) -> Tensor:
    """The same step with plain torch and one large batch; returns the norm before clipping."""
    tokens, targets = one_large_batch(batches)
    optimizer.zero_grad()
    (loss_sum(model, (tokens, targets)) / targets.numel()).backward()
    limit = float("inf") if max_norm is None else max_norm
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    return norm


def twins(
    make_optimizer: Callable[[Any], Optimizer], model: nn.Module | None = None
) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    """A model and its copy, with an optimizer each."""
    model = TiedModel() if model is None else model
    stock = copy.deepcopy(model)
    return (
        model,
        make_optimizer(model.parameters()),
        stock,
        make_optimizer(stock.parameters()),
    )


def assert_same_parameters(
    model: nn.Module,
    expected: nn.Module,
    dtype: torch.dtype | None = None,
    exactly: bool = False,
) -> None:
    """But for rounding, the coarsest to dtype (the parameters'); exactly: bit by bit."""
    actual, reference = list(model.parameters()), list(expected.parameters())
    if exactly:
        assert all(torch.equal(a, b) for a, b in zip(actual, reference, strict=True))
    else:
        assert_same_but_for_rounding(actual, reference, dtype)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_change(
    model: nn.Module, expected: nn.Module, start: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """What both models have learnt since start, rounded to dtype on the way."""
    changes = [
        [now.detach().double() - before for now, before in zip(m.parameters(), start, strict=True)]
        for m in (model, expected)
    ]
    assert_same_but_for_rounding(*changes, dtype)
