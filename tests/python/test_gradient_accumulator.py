"""torch_ext.GradientAccumulator: a window of micro-batches is one large batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_models import (
    TiedModel,
    accumulate,
    assert_same_change,
    assert_same_parameters,
    loss_sum,
    snapshot,
    stock_window,
    token_batches,
    twins,
)
from rounding_bounds import assert_same_but_for_rounding
from torch import nn
from torch.optim import Optimizer

import torch_ext
from torch_ext import GradientAccumulator

_SIZES = (3, 1, 5, 2)

_OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW amsgrad maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.9)),
    "Adam weight decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.2),
    "SGD nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
}
# Whatever is not AdamW, Adam or SGD gets its gradients in .grad.
_OTHER_OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "a subclass of SGD": lambda p: type("Mine", (torch.optim.SGD,), {})(p, lr=0.1),
}


@pytest.mark.parametrize("add_in_backward", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_a_window_equals_one_large_batch(name: str, add_in_backward: bool) -> None:
    model, optimizer, stock, stock_optimizer = twins(_OPTIMIZERS[name])
    accumulator = GradientAccumulator(
        model, optimizer, max_norm=0.5, add_in_backward=add_in_backward
    )
    for window in range(3):
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        norm = accumulator.step()
        expected = stock_window(stock, stock_optimizer, batches, max_norm=0.5)
        assert_same_but_for_rounding(norm, expected)
        assert_same_parameters(model, stock)
    assert accumulator.micro_batches == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", _OTHER_OPTIMIZERS)
def test_other_optimizers_step_through_grad(name: str) -> None:
    model, optimizer, stock, stock_optimizer = twins(_OTHER_OPTIMIZERS[name])
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
    for window in range(2):
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches, max_norm=0.5)
        assert_same_parameters(model, stock)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("add_in_backward", [True, False])
def test_against_float64(add_in_backward: bool) -> None:
    model, optimizer, exact, exact_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    exact.double()
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=add_in_backward)
    batches = token_batches(_SIZES)
    accumulate(accumulator, batches)
    norm = accumulator.step()
    tokens, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    loss = nn.functional.cross_entropy(exact(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    expected = nn.utils.get_total_norm([p.grad for p in exact.parameters()])
    exact_optimizer.step()
    assert_same_but_for_rounding(norm, expected)
    assert_same_parameters(model, exact)


def test_float64_parameters_are_summed_in_float64() -> None:
    model, optimizer, stock, stock_optimizer = twins(
        lambda p: torch.optim.AdamW(p, lr=1e-2), TiedModel().double()
    )
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    for batch in batches:
        with accumulator.micro_batch(weight=batch[1].numel()):
            logits = model(batch[0]).flatten(0, 1)
            nn.functional.cross_entropy(logits, batch[1].flatten(), reduction="sum").backward()
    norm = accumulator.step()
    assert norm.dtype == torch.float64
    tokens, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    nn.functional.cross_entropy(stock(tokens).flatten(0, 1), targets.flatten()).backward()
    stock_optimizer.step()
    assert_same_parameters(model, stock)


def test_equal_micro_batches_of_mean_losses_need_no_weights() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches((2, 2, 2))
    for batch in batches:
        with accumulator.micro_batch():
            (loss_sum(model, batch) / batch[1].numel()).backward()
    accumulator.step()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_weights_may_be_tensors_zero_and_found_out_late() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches((2, 3))
    with accumulator.micro_batch(weight=torch.tensor(batches[0][1].numel())):
        loss_sum(model, batches[0]).backward()
    with accumulator.micro_batch() as micro_batch:
        loss_sum(model, batches[1]).backward()
        micro_batch.weight = batches[1][1].numel()
    with accumulator.micro_batch(weight=0):
        (loss_sum(model, batches[1]) * 0.0).backward()
    accumulator.step()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_parameter_groups_keep_their_settings() -> None:
    def make(parameters: Any) -> Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW(
            [
                {"params": parameters[:2], "lr": 1e-3, "weight_decay": 0.0},
                {"params": parameters[2:], "lr": 3e-2, "betas": (0.5, 0.7)},
            ],
            weight_decay=0.3,
        )

    model, optimizer, stock, stock_optimizer = twins(make)
    accumulator = GradientAccumulator(model, optimizer)
    for window in range(2):
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


@pytest.mark.parametrize("add_in_backward", [True, False])
def test_frozen_and_unused_parameters_stay(add_in_backward: bool) -> None:
    def prepared() -> nn.Module:
        torch.manual_seed(3)
        model = TiedModel()
        model.unused = nn.Linear(3, 3)
        model.twice.bias.requires_grad_(False)
        model.convolution.requires_grad_(False)
        return model

    model, optimizer, stock, stock_optimizer = twins(
        lambda p: torch.optim.AdamW(p, lr=1e-2), prepared()
    )
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=add_in_backward)
    for window in range(2):
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches)
        if window == 0:
            # Thawed between windows.
            model.twice.bias.requires_grad_(True)
            stock.twice.bias.requires_grad_(True)
    assert_same_parameters(model, stock)
    assert optimizer.state.keys().isdisjoint(model.unused.parameters())
    assert set(map(len, optimizer.state_dict()["state"].values())) == {3}


def test_learning_rate_schedulers_drive_the_fused_step(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=3e-2, total_steps=8)
        for o in (optimizer, stock_optimizer)
    ]
    accumulator = GradientAccumulator(model, optimizer)
    for window in range(4):
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_parameters(model, stock)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_zero_grad_anywhere_is_harmless() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    for index, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=bool(index % 2))
        with accumulator.micro_batch(weight=batch[1].numel()):
            model.zero_grad()
            loss_sum(model, batch).backward()
        model.zero_grad()
    accumulator.step()
    optimizer.zero_grad()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_gradients_outside_micro_batches_stay_where_they_are() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    loss_sum(model, batches[0]).backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    values = {name: grad.clone() for name, grad in before.items()}
    accumulate(accumulator, batches)
    accumulator.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name]
        assert torch.equal(parameter.grad, values[name])
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_max_norm_may_change_and_be_infinite() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer, max_norm=float("inf"))
    for window, max_norm in enumerate((None, 0.01, float("inf"))):
        accumulator.max_norm = max_norm
        batches = token_batches(_SIZES, seed=window)
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches, max_norm)
        assert_same_parameters(model, stock)


def test_several_backward_passes_in_one_micro_batch() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.5))
    accumulator = GradientAccumulator(model, optimizer)
    first, second = token_batches((2, 3))
    with accumulator.micro_batch(weight=25):
        loss = loss_sum(model, first)
        (loss * 0.25).backward(retain_graph=True)
        (loss * 0.75).backward()
        loss_sum(model, second).backward()
    accumulator.step()
    stock_window(stock, stock_optimizer, [first, second])
    assert_same_parameters(model, stock)


def test_stock_steps_and_windows_may_alternate() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    accumulator = GradientAccumulator(model, optimizer)
    for window in range(4):
        batches = token_batches(_SIZES, seed=window)
        if window % 2:
            stock_window(model, optimizer, batches)
            optimizer.zero_grad()
        else:
            accumulate(accumulator, batches)
            accumulator.step()
        stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_step_hooks_of_the_optimizer_see_gradients() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    seen: list[list[torch.Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in model.parameters()])
    )
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    accumulate(accumulator, batches)
    accumulator.step()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)
    assert_same_but_for_rounding(seen[0], [parameter.grad for parameter in stock.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sums_in_another_dtype(dtype: torch.dtype) -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.1))
    accumulator = GradientAccumulator(model, optimizer, dtype=dtype)
    batches = token_batches(_SIZES)
    accumulate(accumulator, batches)
    start = snapshot(model)
    norm = accumulator.step()
    expected = stock_window(stock, stock_optimizer, batches)
    coarsest = torch.float32 if dtype is torch.float64 else dtype
    assert_same_but_for_rounding(norm, expected, coarsest)
    if dtype is torch.float64:
        assert_same_parameters(model, stock)
    else:
        assert_same_change(model, stock, start, dtype)


def test_numbers_that_bf16_cannot_add() -> None:
    # 256 + 1 - 256 is 0 in bf16.
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    for value in (256.0, 1.0, -256.0):
        with accumulator.micro_batch():
            layer(torch.tensor([[value]], dtype=torch.bfloat16)).backward()
    assert accumulator.step().item() == pytest.approx(1.0 / 3.0)


def test_the_first_micro_batch_overwrites_what_is_not_finite() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    for _ in range(2):  # in a first window, and over the sums of an earlier one
        before = copy.deepcopy(model.state_dict())
        steps = [s["step"].item() for s in optimizer.state.values()]
        accumulate(accumulator, batches[:2])
        with accumulator.micro_batch(weight=5):
            (loss_sum(model, batches[2]) * float("nan")).backward()
        norm = accumulator.step()
        assert not norm.isfinite()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert [s["step"].item() for s in optimizer.state.values()] == steps
        accumulate(accumulator, batches)
        accumulator.step()
        stock_window(stock, stock_optimizer, batches)
        assert_same_parameters(model, stock)


def test_a_window_without_weight_is_skipped() -> None:
    model, optimizer, stock, _ = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    accumulator = GradientAccumulator(model, optimizer)
    with accumulator.micro_batch(weight=0):
        loss_sum(model, token_batches((2,))[0]).backward()
    assert not accumulator.step().isfinite()
    assert_same_parameters(model, stock, exactly=True)


def test_bitwise_the_same_for_every_thread_count(
    set_num_threads: Callable[[int], None],
) -> None:
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        torch.manual_seed(5)
        # torch's own backward depends on the number of threads; these gradients are given.
        model = nn.ParameterList([torch.randn(size) for size in (70_000, 3, 130_001)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        accumulator = GradientAccumulator(model, optimizer, max_norm=0.1)
        for weight in (3, 9, 2):
            with accumulator.micro_batch(weight):
                sum((torch.randn_like(p) * p).sum() for p in model).backward()
        results.append([accumulator.step(), *model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_properties() -> None:
    model = TiedModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = torch_ext.GradientAccumulator(model, optimizer, max_norm=2)
    assert accumulator.model is model
    assert accumulator.optimizer is optimizer
    assert accumulator.max_norm == 2.0
    accumulate(accumulator, token_batches((1, 2)))
    assert accumulator.micro_batches == 2
    accumulator.reset()
    assert accumulator.micro_batches == 0
