"""Autocast, bf16 and fp16 parameters with their master weights, and torch.amp.GradScaler."""

from __future__ import annotations

import copy

import pytest
import torch
from accumulation_models import (
    TiedModel,
    accumulate,
    assert_same_change,
    assert_same_parameters,
    loss_sum,
    one_large_batch,
    snapshot,
    stock_window,
    token_batches,
    twins,
)
from rounding_bounds import assert_same_but_for_rounding, no_further_than
from torch import Tensor, nn

from torch_ext import GradientAccumulator

_SIZES = (3, 1, 2)


def _adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add_in_backward", [True, False], ids=["fused", "unfused"])
def test_autocast_sums_in_float32(dtype: torch.dtype, add_in_backward: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    accumulator = GradientAccumulator(
        layer, torch.optim.SGD(layer.parameters(), lr=1.0), add_in_backward=add_in_backward
    )
    inputs = [torch.randn(size, 40) for size in (7, 3)]
    start = layer.weight.detach().clone()
    exact = torch.zeros(30, 40, dtype=torch.float64)
    exact_bias = torch.zeros(30, dtype=torch.float64)
    grads = [torch.randn(len(x), 30).to(dtype) for x in inputs]
    for x, grad in zip(inputs, grads, strict=True):
        with accumulator.micro_batch():
            with torch.autocast("cpu", dtype=dtype):
                out = layer(x)
            assert out.dtype == dtype
            out.backward(grad)
        exact += grad.double().t() @ x.to(dtype).double()
        exact_bias += grad.double().sum(0)
    bias = layer.bias.detach().clone()
    accumulator.step()
    # Fused: the products' sums are never rounded to the low precision.
    assert_same_but_for_rounding(
        [start - layer.weight.detach(), bias - layer.bias.detach()],
        [exact / 2, exact_bias / 2],
        torch.float32 if add_in_backward else dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training_follows_float32(dtype: torch.dtype) -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.SGD(p, lr=0.2))
    accumulator = GradientAccumulator(model, optimizer, max_norm=1.0)
    start = snapshot(model)
    for window in range(3):
        batches = token_batches(_SIZES, seed=window)
        for batch in batches:
            with (
                accumulator.micro_batch(weight=batch[1].numel()),
                torch.autocast("cpu", dtype=dtype),
            ):
                loss = loss_sum(model, batch)
                loss.backward()
        accumulator.step()
        stock_window(stock, stock_optimizer, batches, max_norm=1.0)
    assert_same_change(model, stock, start, dtype)


def test_autocast_copies_do_not_outlive_a_step_or_a_load() -> None:
    layer = nn.Linear(4, 4)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.5))
    x = torch.randn(3, 4)

    def output() -> Tensor:
        with accumulator.micro_batch(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
            out.sum().backward()
        return out

    def expected() -> Tensor:
        weight, bias = layer.weight.bfloat16(), layer.bias.bfloat16()
        return nn.functional.linear(x.bfloat16(), weight, bias)

    assert torch.equal(output(), expected())
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert torch.equal(output(), expected())
    accumulator.step()
    layer.weight.data.mul_(2.0)
    assert torch.equal(output(), expected())


def test_autocast_with_a_weight_that_is_used_outside_linear_too() -> None:
    # torch's own cache of autocast copies must keep its history.
    model = nn.Linear(4, 4, bias=False)
    stock, start = copy.deepcopy(model), snapshot(model)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.5))
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.5)
    x = torch.randn(3, 4)

    def loss(layer: nn.Linear) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (layer(x) + x @ layer.weight).float().square().sum()

    with accumulator.micro_batch():
        loss(model).backward()
    accumulator.step()
    loss(stock).backward()
    optimizer.step()
    assert_same_change(model, stock, start, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_low_precision_parameters_train_as_their_float32_masters(
    dtype: torch.dtype, name: str
) -> None:
    """Small updates that the parameters cannot hold must not vanish."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 8)
    low = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        for parameter, source in zip(layer.parameters(), low.parameters(), strict=True):
            parameter.copy_(source)
    kind = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-5),
        "SGD": lambda p: torch.optim.SGD(p, lr=2e-5, momentum=0.9),
    }[name]
    optimizer, low_optimizer = kind(layer.parameters()), kind(low.parameters())
    accumulator = GradientAccumulator(low, low_optimizer)
    inputs = torch.randn(6, 24).to(dtype)
    for _ in range(30):
        for x in (inputs[:2], inputs[2:]):
            with accumulator.micro_batch(weight=len(x)):
                low(x).float().sum().backward()
        accumulator.step()
        optimizer.zero_grad()
        (layer(inputs.float()).sum() / 6).backward()
        optimizer.step()
    for parameter, reference in zip(low.parameters(), layer.parameters(), strict=True):
        assert parameter.dtype == dtype
        # Within one rounding of the float32 run.
        unit = torch.finfo(dtype).eps
        assert ((parameter.float() - reference).abs() <= unit * reference.abs() + 1e-6).all()


def test_masters_follow_what_others_write() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=1e-4))

    def window() -> None:
        with accumulator.micro_batch():
            layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        accumulator.step()

    window()
    master = accumulator.state_dict()["master.weight"].clone()
    assert not torch.equal(master, layer.weight.float())
    with torch.no_grad():
        layer.weight[0].fill_(3.0)
    window()
    after = accumulator.state_dict()["master.weight"]
    torch.testing.assert_close(after[0], torch.full((4,), 3.0 - 1e-4))
    torch.testing.assert_close(after[1:], master[1:] - 1e-4, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_optimizers_take_low_precision_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, optimizer, stock, stock_optimizer = twins(
        lambda p: torch.optim.ASGD(p, lr=0.5), nn.Linear(8, 8).to(dtype)
    )
    start = snapshot(model)
    accumulator = GradientAccumulator(model, optimizer)
    inputs = torch.randn(4, 8).to(dtype)
    for x in (inputs[:1], inputs[1:]):
        with accumulator.micro_batch(weight=len(x)):
            model(x).float().square().sum().backward()
    accumulator.step()
    (stock(inputs).float().square().sum() / 4).backward()
    stock_optimizer.step()
    assert_same_change(model, stock, start, dtype)


def test_a_step_hook_added_later_changes_nothing() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    optimizer = _adamw(layer.parameters())
    accumulator = GradientAccumulator(layer, optimizer)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for _ in range(2):
        with accumulator.micro_batch():
            layer(x).sum().backward()
        accumulator.step()
        optimizer.register_step_pre_hook(lambda *_: None)
    assert optimizer.state[layer.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(accumulator.state_dict()["master.weight"].bfloat16(), layer.weight)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "fp16 parameters"])
def test_grad_scaler(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, optimizer, stock, stock_optimizer = twins(_adamw)
    if dtype is not None:
        model.to(dtype)
        with torch.no_grad():
            for parameter, source in zip(stock.parameters(), model.parameters(), strict=True):
                parameter.copy_(source)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
    for window in range(3):
        batches = token_batches(_SIZES, seed=window)
        for batch in batches:
            with accumulator.micro_batch(weight=batch[1].numel()):
                scaler.scale(loss_sum(model, batch)).backward()
        norm = accumulator.step(scaler)
        scaler.update()
        expected = stock_window(stock, stock_optimizer, batches, max_norm=0.5)
        assert_same_but_for_rounding(norm, expected, dtype)
    # Twice without an overflow.
    assert scaler.get_scale() == 2048.0
    assert_same_parameters(model, stock)


def test_grad_scaler_backs_off_after_an_overflow() -> None:
    model, optimizer, stock, stock_optimizer = twins(_adamw)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    with accumulator.micro_batch():
        scaler.scale(loss_sum(model, batches[0]) * 1e30).backward()
    accumulator.step(scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    assert_same_parameters(model, stock, exactly=True)
    assert not optimizer.state
    for batch in batches:
        with accumulator.micro_batch(weight=batch[1].numel()):
            scaler.scale(loss_sum(model, batch)).backward()
    accumulator.step(scaler)
    scaler.update()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_grad_scaler_with_an_optimizer_that_is_not_fused() -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.Adagrad(p, lr=1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    for batch in batches:
        with accumulator.micro_batch(weight=batch[1].numel()):
            scaler.scale(loss_sum(model, batch)).backward()
    accumulator.step(scaler)
    scaler.update()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_a_disabled_grad_scaler_changes_nothing() -> None:
    model, optimizer, stock, stock_optimizer = twins(_adamw)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    accumulator = GradientAccumulator(model, optimizer)
    batches = token_batches(_SIZES)
    accumulate(accumulator, batches)
    accumulator.step(scaler)
    scaler.update()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)


def test_bfloat16_model_against_float64() -> None:
    """Sums and moments in float32: not worse than what one large bf16 batch gives."""
    torch.manual_seed(3)
    model = TiedModel().bfloat16()
    exact = copy.deepcopy(model).double()
    stock = copy.deepcopy(model)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    batches = token_batches((4, 2, 6, 3))
    accumulate(accumulator, batches)
    norm = accumulator.step().item()
    tokens, targets = one_large_batch(batches)

    def reference(module: nn.Module) -> float:
        logits = module(tokens).flatten(0, 1)
        nn.functional.cross_entropy(logits.double(), targets.flatten()).backward()
        grads = [p.grad.double() for p in module.parameters()]
        return nn.utils.get_total_norm(grads).item()

    expected = reference(exact)
    stock_error = abs(reference(stock) - expected)
    assert abs(norm - expected) <= no_further_than(stock_error, expected, torch.bfloat16)
