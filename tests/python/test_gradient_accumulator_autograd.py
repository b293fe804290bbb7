"""GradientAccumulator beside what else people do with autograd inside a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accumulation_models import (
    accumulate,
    assert_same_parameters,
    loss_sum,
    one_large_batch,
    stock_window,
    token_batches,
    twins,
)
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 2))


def _sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("add_in_backward", [True, False], ids=["fused", "unfused"])
def test_tensor_hooks_see_and_change_the_micro_batchs_gradient(add_in_backward: bool) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    seen: list[Tensor] = []

    def doubled(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2.0

    model.twice.weight.register_hook(doubled)
    model.embedding.weight.register_hook(doubled)
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=add_in_backward)
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    assert len(seen) == 2 * len(_BATCHES)
    stock.twice.weight.register_hook(lambda gradient: gradient * 2.0)
    stock.embedding.weight.register_hook(lambda gradient: gradient * 2.0)
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


@pytest.mark.parametrize("add_in_backward", [True, False], ids=["fused", "unfused"])
def test_post_accumulate_hooks_find_the_gradient(add_in_backward: bool) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    norms: list[float] = []
    handle = model.twice.weight.register_post_accumulate_grad_hook(
        lambda parameter: norms.append(parameter.grad.norm().item())
    )
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=add_in_backward)
    accumulate(accumulator, _BATCHES)
    assert len(norms) == len(_BATCHES)
    assert min(norms) > 0.0
    handle.remove()
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_a_hook_that_keeps_the_gradient_keeps_its_values() -> None:
    model, optimizer, _, _ = twins(_sgd)
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(parameter: Tensor) -> None:
        kept.append(parameter.grad)
        copies.append(parameter.grad.clone())

    model.norm.weight.register_post_accumulate_grad_hook(keep)
    accumulator = GradientAccumulator(model, optimizer)
    for _ in range(2):
        accumulate(accumulator, _BATCHES)
        accumulator.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_hooks_on_accumulation_nodes_get_gradients() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    calls: list[int] = []
    node = model.twice.weight.view_as(model.twice.weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda gradients: calls.append(gradients[0].numel()))
    accumulator = GradientAccumulator(model, optimizer)
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    assert calls == [model.twice.weight.numel()] * len(_BATCHES)
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


class _Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 12)
        self.block = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 12))
        self.head = nn.Linear(12, 23)
        self.use_reentrant = use_reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for _ in range(2):  # the same weights twice, one recomputed after the other
            hidden = hidden + checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd, _Checkpointed(use_reentrant))
    accumulator = GradientAccumulator(model, optimizer)
    torch.manual_seed(1)
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    torch.manual_seed(1)
    stock_optimizer.zero_grad()
    total = sum(targets.numel() for _, targets in _BATCHES)
    for batch in _BATCHES:
        (loss_sum(stock, batch) / total).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_autograd_grad_is_untouched_outside_and_inside() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_sum(stock, _BATCHES[0]), list(stock.parameters()))
    outside = torch.autograd.grad(loss_sum(model, _BATCHES[0]), parameters)
    with accumulator.micro_batch(weight=_BATCHES[0][1].numel()):
        inside = torch.autograd.grad(loss_sum(model, _BATCHES[0]), parameters)
        loss_sum(model, _BATCHES[0]).backward()
    accumulate(accumulator, _BATCHES[1:])
    again = torch.autograd.grad(loss_sum(model, _BATCHES[0]), parameters)
    for gradients in (outside, inside, again):
        assert_same_but_for_rounding(gradients, expected)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_backward_with_inputs_reaches_only_those() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    for batch in _BATCHES:
        with accumulator.micro_batch(weight=batch[1].numel()):
            loss_sum(model, batch).backward(inputs=[model.twice.weight, model.norm.bias])
    accumulator.step()
    tokens, targets = one_large_batch(_BATCHES)
    (loss_sum(stock, (tokens, targets)) / targets.numel()).backward(
        inputs=[stock.twice.weight, stock.norm.bias]
    )
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_gradient_penalty() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model, optimizer, stock, stock_optimizer = twins(_sgd, model)
    inputs = [torch.randn(size, 4) for size in (2, 3)]

    def penalised(module: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = module(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().sum() + slope.square().sum()

    accumulator = GradientAccumulator(model, optimizer)
    for x in inputs:
        with accumulator.micro_batch(weight=len(x)):
            penalised(model, x).backward()
    accumulator.step()
    (penalised(stock, torch.cat(inputs)) / 5).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_second_order_gradients_of_the_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    model, optimizer, stock, _ = twins(_sgd, model)
    accumulator = GradientAccumulator(model, optimizer)
    x = torch.randn(4, 3)

    def curvature(module: nn.Module) -> tuple[Tensor, ...]:
        parameters = list(module.parameters())
        first = torch.autograd.grad(module(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    with accumulator.micro_batch():
        actual = curvature(model)
    assert_same_but_for_rounding(actual, curvature(stock))


def test_functional_transforms_inside_a_micro_batch() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def functional_loss(values: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        logits = torch.func.functional_call(model, values, (tokens,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    with accumulator.micro_batch(weight=_BATCHES[0][1].numel()):
        inside = torch.func.grad(functional_loss)(parameters, _BATCHES[0])
        loss_sum(model, _BATCHES[0]).backward()
    outside = torch.func.grad(functional_loss)(parameters, _BATCHES[0])
    assert_same_but_for_rounding(list(inside.values()), list(outside.values()))
    accumulate(accumulator, _BATCHES[1:])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_no_grad_evaluation_inside_a_micro_batch() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    for batch in _BATCHES:
        with accumulator.micro_batch(weight=batch[1].numel()):
            with torch.no_grad():
                expected = loss_sum(stock, batch)
                assert_same_but_for_rounding(loss_sum(model, batch), expected)
            with torch.inference_mode():
                assert_same_but_for_rounding(loss_sum(model, batch), expected)
            loss_sum(model, batch).backward()
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


@pytest.mark.parametrize("compile_it", ["function", "method"])
def test_compiled_models(compile_it: str, fresh_dynamo: None) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    called: nn.Module = model
    if compile_it == "function":
        called = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    else:
        model.compile(backend="aot_eager")
    accumulator = GradientAccumulator(called, optimizer, max_norm=0.5)
    for window in range(2):
        batches = token_batches((2, 3), seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches, max_norm=0.5)
    assert_same_parameters(model, stock)
    assert all(not name.startswith("sum._orig_mod") for name in accumulator.state_dict())


def test_a_compiled_function_around_the_model(fresh_dynamo: None) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    compiled: Callable[..., Tensor] = torch.compile(loss_sum, backend="aot_eager")
    for batch in _BATCHES:
        with accumulator.micro_batch(weight=batch[1].numel()):
            compiled(model, batch).backward()
    with torch.no_grad():
        compiled(model, _BATCHES[0])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)
