"""torch_ext.parallel_micro_batches: random numbers that do not depend on the workers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accumulation_models import Batch, loss_sum, token_batches
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_ext
from torch_ext import GradientAccumulator, parallel_micro_batches

_BATCHES = token_batches((3, 1, 4, 2, 2, 5, 1))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return loss_sum(model, batch), batch[1].numel()


class _WithDropout(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.head = nn.Linear(16, 23)
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointed:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return self.head(hidden + 0.1 * torch.randn(hidden.shape))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("enabled", [False, True], ids=["torch", "torch_ext"])
def test_bitwise_the_same_for_any_number_of_workers(checkpointed: bool, enabled: bool) -> None:
    torch.manual_seed(0)
    model = _WithDropout(checkpointed)
    windows = []
    for workers in (1, 2, 3, 8):
        torch.manual_seed(1)
        copied = copy.deepcopy(model)
        accumulator = GradientAccumulator(copied, _sgd(copied.parameters()))
        with torch_ext.enabled(enabled):
            parallel_micro_batches(accumulator, _loss, _BATCHES, workers)
            loss = parallel_micro_batches(accumulator, _loss, _BATCHES[:3], workers)
        windows.append(accumulator.state_dict() | {"loss": loss, "after": torch.rand(3)})
    for other in windows[1:]:
        for name, value in windows[0].items():
            assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), name


def test_checkpointing_draws_the_same_mask_again() -> None:
    torch.manual_seed(0)
    kept = _WithDropout(checkpointed=False)
    sums = []
    for checkpointed in (False, True):
        model = copy.deepcopy(kept)
        model.checkpointed = checkpointed
        accumulator = GradientAccumulator(model, _sgd(model.parameters()))
        torch.manual_seed(2)
        parallel_micro_batches(accumulator, _loss, _BATCHES, workers=3)
        sums.append(accumulator.state_dict())
    for name, value in sums[0].items():
        if value.is_floating_point():
            assert_same_but_for_rounding(value.nan_to_num(), sums[1][name].nan_to_num())
        else:
            assert torch.equal(value, sums[1][name])


def test_micro_batches_draw_different_numbers() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    model = nn.ParameterList([parameter])
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    drawn: dict[int, list[Tensor]] = {}

    def draw(_: nn.Module, number: int) -> tuple[Tensor, int]:
        weights = torch.full((50,), 0.5)
        drawn[number] = [
            torch.rand(8),
            torch.randn(8),
            torch.randint(1000, (8,)),
            torch.randperm(30),
            torch.empty(20).bernoulli_(0.5),
            torch.bernoulli(weights),
            nn.functional.dropout(torch.ones(40)),
            torch.multinomial(weights, 8),
            torch.normal(weights, weights),
            torch.empty(6).exponential_(),
            torch.poisson(weights * 20),
            torch._standard_gamma(weights),
        ]
        return parameter.sum(), 1

    results = []
    for workers in (1, 3):
        torch.manual_seed(5)
        parallel_micro_batches(accumulator, draw, range(6), workers)
        results.append(copy.deepcopy(drawn))
    for number in range(6):
        for a, b in zip(results[0][number], results[1][number], strict=True):
            assert torch.equal(a, b)
        if number:
            for a, b in zip(results[0][number], results[0][0], strict=True):
                assert not torch.equal(a, b)
    # Another call draws anew, and the caller's generator has drawn once a call.
    parallel_micro_batches(accumulator, draw, range(6), 2)
    assert not torch.equal(drawn[0][0], results[0][0][0])
    torch.manual_seed(5)
    parallel_micro_batches(accumulator, draw, range(1), 1)
    one = torch.rand(3)
    torch.manual_seed(5)
    parallel_micro_batches(accumulator, draw, range(6), 1)
    assert torch.equal(torch.rand(3), one)


def test_seeding_inside_a_micro_batch_is_its_own_affair() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    model = nn.ParameterList([parameter])
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    drawn: dict[int, Tensor] = {}

    def draw(_: nn.Module, number: int) -> tuple[Tensor, int]:
        torch.manual_seed(number)
        state = torch.get_rng_state()
        first = torch.rand(3)
        torch.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))
        with torch.random.fork_rng():
            torch.rand(1)
        drawn[number] = torch.rand(3)
        return parameter.sum(), 1

    before = torch.random.default_generator
    torch.manual_seed(77)
    expected = torch.randint(2**62, ()), torch.rand(3)
    torch.manual_seed(77)
    parallel_micro_batches(accumulator, draw, range(4), 2)
    assert torch.equal(torch.rand(3), expected[1])
    assert torch.random.default_generator is before
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(torch.rand(3), drawn[2])
