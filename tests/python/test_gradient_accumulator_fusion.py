"""Gradients that are added to the sums inside backward: linear, embedding and large layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accumulation_models import (
    TiedModel,
    accumulate,
    assert_same_parameters,
    loss_sum,
    one_large_batch,
    stock_window,
    token_batches,
    twins,
)
from rounding_bounds import assert_no_further, assert_same_but_for_rounding
from torch import Tensor, nn

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 2))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def test_modules_are_theirs_again_afterwards() -> None:
    model, optimizer, _, _ = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    with accumulator.micro_batch():
        assert "forward" in vars(model.twice)
        assert "forward" in vars(model.embedding)
        assert type(model.twice) is nn.Linear
        loss_sum(model, _BATCHES[0]).backward()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_made_inside_a_micro_batch_has_weights_of_its_own() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    with accumulator.micro_batch(weight=_BATCHES[0][1].numel()):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2.0)
        expected = loss_sum(copied, _BATCHES[0])
        assert expected != loss_sum(model, _BATCHES[0])
        expected.backward()
        loss_sum(model, _BATCHES[0]).backward()
    assert torch.equal(loss_sum(copied, _BATCHES[0]), expected)
    assert all(parameter.grad is not None for parameter in copied.parameters())
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES[:1])
    assert_same_parameters(model, stock)


def test_layers_with_a_forward_of_their_own_keep_it() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3.0

    def hooked(input: Tensor) -> Tensor:
        return nn.functional.linear(input, model[1].weight, model[1].bias) * 2.0

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model, optimizer, stock, stock_optimizer = twins(_sgd, model)
    model[1].forward = hooked
    stock[1].forward = lambda x: nn.functional.linear(x, stock[1].weight, stock[1].bias) * 2.0
    accumulator = GradientAccumulator(model, optimizer)
    x = torch.randn(5, 4)
    with accumulator.micro_batch(weight=5):
        model(x).square().sum().backward()
    accumulator.step()
    assert model[1].forward is hooked
    (stock(x).square().sum() / 5).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_parametrized_and_shared_layers() -> None:
    def prepared() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
        nn.utils.parametrizations.weight_norm(model[0])
        model[3].weight = model[2].weight  # one weight, two biases
        model[3].bias.requires_grad_(False)
        return model

    torch.manual_seed(2)
    model = prepared()
    torch.manual_seed(2)
    stock = prepared()
    optimizer, stock_optimizer = _sgd(model.parameters()), _sgd(stock.parameters())
    accumulator = GradientAccumulator(model, optimizer)
    inputs = [torch.randn(size, 4) for size in (2, 5)]
    for x in inputs:
        with accumulator.micro_batch(weight=len(x)):
            model(x).square().sum().backward()
    accumulator.step()
    (stock(torch.cat(inputs)).square().sum() / 7).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_embedding_options() -> None:
    def prepared() -> nn.Module:
        torch.manual_seed(4)
        return nn.ModuleList(
            [
                nn.Embedding(9, 3, padding_idx=-1),
                nn.Embedding(9, 3, scale_grad_by_freq=True),
                nn.Embedding(9, 3, max_norm=0.5),
            ]
        )

    tokens = torch.tensor([[0, 1, 1, 8], [8, 8, 2, 0]])
    models = prepared(), prepared()
    optimizers = [_sgd(model.parameters()) for model in models]
    accumulator = GradientAccumulator(models[0], optimizers[0])
    for _ in range(2):
        with accumulator.micro_batch(weight=4):
            sum(layer(tokens).square().sum() for layer in models[0]).backward()
    accumulator.step()
    for _ in range(2):
        (sum(layer(tokens).square().sum() for layer in models[1]) / 8).backward()
    optimizers[1].step()
    assert_same_parameters(*models)


def test_inputs_of_every_number_of_dimensions() -> None:
    torch.manual_seed(6)
    model, optimizer, stock, stock_optimizer = twins(_sgd, nn.Linear(4, 3))
    accumulator = GradientAccumulator(model, optimizer)
    inputs = [
        torch.randn(4),
        torch.randn(2, 4),
        torch.randn(2, 0, 4),
        torch.randn(4, 3, 2).permute(1, 2, 0),
        torch.randn(1, 4).expand(5, 4),
    ]
    for x in inputs:
        with accumulator.micro_batch():
            model(x).square().sum().backward()
        (stock(x).square().sum() / len(inputs)).backward()
    accumulator.step()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_gradient_of_the_input_of_a_frozen_or_first_layer() -> None:
    model = nn.Linear(4, 3)
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    x = torch.randn(2, 4, requires_grad=True)
    with accumulator.micro_batch():
        model(x).sum().backward()
    assert_same_but_for_rounding(x.grad, model.weight.sum(0).expand(2, 4))


def test_the_large_batchs_gradient_is_what_the_optimizer_gets() -> None:
    model = TiedModel()
    seen: list[Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            seen.extend(p.grad.clone() for p in self.param_groups[0]["params"])

    accumulator = GradientAccumulator(model, Recorder(model.parameters(), lr=0.1))
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    tokens, targets = one_large_batch(_BATCHES)
    loss = loss_sum(model, (tokens, targets)) / targets.numel()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert_same_but_for_rounding(seen, gradients)


class _Large(nn.Module):
    """Parameters that are large enough to be added during backward, and no layers that fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(300, 300) / 17.0)
        self.scale = nn.Parameter(torch.ones(300))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table) * self.scale


def _train(module: nn.Module, accumulator: GradientAccumulator, inputs: list[Tensor]) -> None:
    for x in inputs:
        with accumulator.micro_batch(weight=len(x)):
            module(x).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_leave_grad_during_backward(dtype: torch.dtype) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd, _Large().to(dtype))
    exact = copy.deepcopy(stock).double()
    exact_optimizer = _sgd(exact.parameters())
    accumulator = GradientAccumulator(model, optimizer)
    inputs = [torch.randn(size, 300).to(dtype) for size in (2, 1, 3)]
    for _ in range(2):
        _train(model, accumulator, inputs)
        with accumulator.micro_batch(weight=0):
            (model(inputs[0]) * 0.0).sum().backward()
            assert model.table.grad is None
            assert model.scale.grad is not None
        accumulator.step()
        for module, other in ((stock, stock_optimizer), (exact, exact_optimizer)):
            other.zero_grad()
            x = torch.cat(inputs).to(module.table.dtype)
            (module(x).square().sum() / 6).backward()
            other.step()
    assert_no_further(*(dict(module.named_parameters()) for module in (model, stock, exact)))


def test_without_fusion_grad_holds_the_micro_batchs_gradients_to_the_end() -> None:
    model = nn.Sequential(_Large(), nn.Linear(300, 300))
    model, optimizer, stock, stock_optimizer = twins(_sgd, model)
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=False)
    inputs = [torch.randn(size, 300) for size in (2, 1)]
    for x in inputs:
        with accumulator.micro_batch():
            model(x).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    accumulator.step()
    expected = [torch.zeros_like(p) for p in stock.parameters()]
    for x in inputs:
        stock_optimizer.zero_grad()
        stock(x).square().sum().backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 0.1)
        for total, parameter in zip(expected, stock.parameters(), strict=True):
            total += parameter.grad / len(inputs)
    for total, parameter in zip(expected, stock.parameters(), strict=True):
        parameter.grad = total
    stock_optimizer.step()
    assert_same_parameters(model, stock)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # of the cycle that it makes
def test_hooks_and_graphs_of_large_gradients() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd, _Large())
    norms: list[float] = []
    for module in (model, stock):
        module.table.register_hook(lambda grad: grad * 2.0)
    model.table.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm().item()))
    accumulator = GradientAccumulator(model, optimizer)
    inputs = [torch.randn(2, 300), torch.randn(1, 300)]
    _train(model, accumulator, inputs)
    with accumulator.micro_batch(weight=1):
        model(inputs[1]).square().sum().backward(create_graph=True)
        assert model.table.grad is not None
    assert len(norms) == 3
    accumulator.step()
    (stock(torch.cat([*inputs, inputs[1]])).square().sum() / 4).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_accumulators_of_one_model_do_not_disturb_each_other() -> None:
    model = nn.Sequential(_Large(), nn.Linear(300, 300))
    model, optimizer, stock, stock_optimizer = twins(_sgd, model)
    first = GradientAccumulator(model, optimizer)
    inputs = [torch.randn(2, 300), torch.randn(1, 300)]
    _train(model, first, inputs)
    first.reset()
    second = GradientAccumulator(model, optimizer)
    _train(model, second, inputs)
    with second.micro_batch(weight=0):
        (model(inputs[0]) * 0.0).sum().backward()
        assert model[1].weight.grad is None
    assert first.micro_batches == 0
    del first
    _train(model, second, inputs)
    second.step()
    (stock(torch.cat(inputs)).square().sum() / 3).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)
    model.zero_grad()
    model(inputs[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_with_strides_of_their_own() -> None:
    model = nn.ParameterList([torch.randn(300, 260), torch.randn(280, 290)])
    model, optimizer, stock, stock_optimizer = twins(_sgd, model)
    accumulator = GradientAccumulator(model, optimizer)

    def loss(parameters: nn.ParameterList, factor: float) -> Tensor:
        transposed = parameters[0].t() * torch.linspace(0.0, factor, 300)
        return transposed.square().sum() + (parameters[1][::2, 1:].sum() * factor)

    for factor in (1.0, 2.0):
        with accumulator.micro_batch():
            loss(model, factor).backward()
        (loss(stock, factor) / 2).backward()
    accumulator.step()
    stock_optimizer.step()
    assert_same_parameters(model, stock)
