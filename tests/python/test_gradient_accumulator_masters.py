"""Float32 masters follow the parameters, whoever writes those, whatever wraps the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_models import accumulate as accumulate_tokens
from accumulation_models import assert_same_parameters, stock_window, token_batches, twins
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torch_ext import GradientAccumulator

_LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def _net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def _windows(
    model: nn.Module, accumulator: GradientAccumulator, count: int, first: int = 0
) -> None:
    for window in range(first, first + count):
        generator = torch.Generator().manual_seed(window)
        for size in (3, 5):
            batch = torch.randn(size, 8, generator=generator)
            with accumulator.micro_batch(size):
                dtype = next(model.parameters()).dtype
                model(batch.to(dtype)).float().square().sum().backward()
        accumulator.step()


def _write_copy(model: nn.Module, value: Tensor) -> None:
    vector_to_parameters(
        value.to(parameters_to_vector(model.parameters()).dtype), model.parameters()
    )


def _write_in_place(model: nn.Module, value: Tensor) -> None:
    first = 0
    for param in model.parameters():
        param.data.view(-1).copy_(value[first : first + param.numel()])
        first += param.numel()


def _write_through_storage(model: nn.Module, value: Tensor) -> None:
    first = 0
    for param in model.parameters():
        flat = torch.empty(0, dtype=param.dtype).set_(param.untyped_storage())
        flat.copy_(value[first : first + param.numel()])
        first += param.numel()


def _write_other_memory(model: nn.Module, value: Tensor) -> None:
    first = 0
    for param in model.parameters():
        part = value[first : first + param.numel()].view(param.shape)
        param.data = part.to(param.dtype)
        first += param.numel()


_WRITES: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "vector_to_parameters": _write_copy,
    "data in place": _write_in_place,
    "storage": _write_through_storage,
    "data": _write_other_memory,
}

_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@_LOW_PRECISION
@pytest.mark.parametrize("optimizer", _OPTIMIZERS)
@pytest.mark.parametrize("write", _WRITES)
def test_masters_follow_what_the_parameters_hold(
    write: str, optimizer: str, dtype: torch.dtype
) -> None:
    # Two models that are somewhere else are given the same parameters: from there on they go the
    # same way, their optimizers being alike.
    nets = []
    for seed in (1, 2):
        net = _net(dtype)
        accumulator = GradientAccumulator(net, _OPTIMIZERS[optimizer](net.parameters()))
        _windows(net, accumulator, 3, first=10 * seed)
        accumulator.optimizer.state.clear()
        torch.manual_seed(5)
        _WRITES[write](net, torch.randn(sum(p.numel() for p in net.parameters())))
        _windows(net, accumulator, 4)
        nets.append(net)
    assert_same_parameters(nets[0], nets[1], exactly=True)


def test_elements_that_nobody_wrote_keep_their_masters() -> None:
    layer = nn.Linear(64, 4, bias=False, dtype=torch.bfloat16)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=1e-4))

    def window() -> Tensor:
        with accumulator.micro_batch():
            layer(torch.ones(1, 64, dtype=torch.bfloat16)).float().sum().backward()
        accumulator.step()
        return accumulator.state_dict()["master.weight"].clone()

    before = window()
    assert not torch.equal(before, layer.weight.float())
    layer.weight.data.clamp_(max=0.05)
    clamped = layer.weight == torch.tensor(0.05, dtype=torch.bfloat16)
    assert clamped.any()
    assert not clamped.all()
    after = window()
    torch.testing.assert_close(after[~clamped], before[~clamped] - 1e-4, atol=1e-7, rtol=0)
    expected = torch.full_like(after, 0.05).bfloat16().float() - 1e-4
    torch.testing.assert_close(after[clamped], expected[clamped], atol=1e-7, rtol=0)


def test_a_nan_that_was_written_arrives_and_another_value_heals_it() -> None:
    layer = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for value in (float("nan"), 1.0):
        layer.weight.data[0, 0] = value
        with accumulator.micro_batch():
            layer(torch.zeros(1, 4, dtype=torch.bfloat16)).sum().backward()
        accumulator.step()
        torch.testing.assert_close(layer.weight[0, 0].item(), value, equal_nan=True, atol=0, rtol=0)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize(
    ("start", "after"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_model_of_another_dtype_later(start: torch.dtype, after: torch.dtype) -> None:
    net = _net(start)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    accumulator = GradientAccumulator(net, optimizer)
    net.to(after)
    fresh = _net(start).to(after)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    fresh_accumulator = GradientAccumulator(fresh, fresh_optimizer)
    _windows(net, accumulator, 5)
    _windows(fresh, fresh_accumulator, 5)
    assert_same_parameters(net, fresh, exactly=True)
    assert accumulator.state_dict().keys() == fresh_accumulator.state_dict().keys()
    for mine, theirs in zip(optimizer.state.values(), fresh_optimizer.state.values(), strict=True):
        assert mine["exp_avg"].dtype == theirs["exp_avg"].dtype


def test_another_dtype_in_the_middle_of_a_window_and_of_a_run() -> None:
    net = _net(torch.float32)
    accumulator = GradientAccumulator(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    _windows(net, accumulator, 2)
    with accumulator.micro_batch(3):
        net(torch.randn(3, 8)).square().sum().backward()
    net.to(torch.float64)
    _windows(net, accumulator, 1)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in net.parameters())
    net.to(torch.bfloat16)
    _windows(net, accumulator, 2)
    masters = [value for key, value in accumulator.state_dict().items() if key[:6] == "master"]
    assert len(masters) == 4
    assert all(value.dtype == torch.float32 for value in masters)


def test_other_sizes_in_the_middle_of_a_window_are_refused() -> None:
    layer = nn.Linear(3, 2)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    with accumulator.micro_batch():
        layer(torch.ones(1, 3)).sum().backward()
    layer.weight.data = torch.zeros(2, 5)
    with pytest.raises(
        RuntimeError, match=r"of sizes \[2, 3\] has been given sizes \[2, 5\] while"
    ):
        accumulator.step()
    accumulator.reset()
    with accumulator.micro_batch():
        layer(torch.ones(1, 5)).sum().backward()
    accumulator.step()
    torch.testing.assert_close(layer.weight, torch.full((2, 5), -0.1))


class _Subclass(torch.optim.AdamW):
    pass


def _hooked(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, lr=2e-5)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def _prepared(params: Any) -> torch.optim.Optimizer:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(torch.optim.AdamW(params, lr=2e-5))


_LOW_RATE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "prepared by accelerate": _prepared,
    "subclass": lambda p: _Subclass(p, lr=2e-5),
    "step hook": _hooked,
    "tensor betas": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(2e-5), betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False
    ),
    "foreach": lambda p: _Subclass(p, lr=2e-5, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=2e-6),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=2e-5),
}


@_LOW_PRECISION
@pytest.mark.parametrize("optimizer", _LOW_RATE)
def test_every_optimizer_steps_the_masters(optimizer: str, dtype: torch.dtype) -> None:
    net = _net(dtype)
    start = copy.deepcopy(net)
    used = _LOW_RATE[optimizer](net.parameters())
    accumulator = GradientAccumulator(net, used)
    params = [id(param) for group in used.param_groups for param in group["params"]]
    nodes = [param.view_as(param).grad_fn.next_functions[0][0] for param in net.parameters()]
    _windows(net, accumulator, 40)
    state = accumulator.state_dict()
    moved = 0.0
    for name, param in net.named_parameters():
        master = state["master." + name]
        assert torch.equal(master.to(dtype), param)
        moved = max(moved, (master - start.get_parameter(name).float()).abs().max().item())
        for value in used.state[param].values():
            if isinstance(value, Tensor) and value.shape == param.shape:
                assert value.dtype == torch.float32
    assert moved > 2e-4  # 40 steps of 2e-5, each too small for bf16
    assert [id(p) for group in used.param_groups for p in group["params"]] == params
    assert all(param.dtype == dtype and param.grad is None for param in net.parameters())
    after = [param.view_as(param).grad_fn.next_functions[0][0] for param in net.parameters()]
    assert nodes == after  # whoever holds autograd's accumulation nodes, as DDP does, keeps them


def test_an_optimizer_of_ones_own_steps_as_the_fused_one() -> None:
    nets = []
    for make in (torch.optim.AdamW, _Subclass):
        net = _net()
        accumulator = GradientAccumulator(net, make(net.parameters(), lr=1e-3), max_norm=0.5)
        _windows(net, accumulator, 6)
        nets.append(accumulator.state_dict())
    assert nets[0].keys() == nets[1].keys()
    masters = [[net[name] for name in sorted(net) if "master." in name] for net in nets]
    assert_same_but_for_rounding(*masters)


def test_parameters_are_themselves_again_after_a_step_that_raises() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            raise KeyboardInterrupt

    net = _net()
    start = copy.deepcopy(net)
    accumulator = GradientAccumulator(net, Broken(net.parameters(), lr=1.0))
    with pytest.raises(KeyboardInterrupt):
        _windows(net, accumulator, 1)
    assert all(param.dtype == torch.bfloat16 and param.grad is None for param in net.parameters())
    assert any((p != q).any() for p, q in zip(net.parameters(), start.parameters(), strict=True))


@_LOW_PRECISION
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.NAdam(p, lr=1e-2),
        lambda p: _Subclass(p, lr=1e-2),
    ],
)
def test_the_optimizers_own_step_goes_on_after_a_window(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    net = _net(dtype)
    optimizer = make(net.parameters())
    accumulator = GradientAccumulator(net, optimizer)
    _windows(net, accumulator, 2)
    # A copy has none of the hooks, but the moments.
    for model, own in ((net, optimizer), copy.deepcopy((net, optimizer))):
        before = [param.detach().clone() for param in model.parameters()]
        own.zero_grad()
        model(torch.randn(4, 8).to(dtype)).float().square().sum().backward()
        own.step()
        own.zero_grad()
        assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    _windows(net, accumulator, 2, first=5)
    state = accumulator.state_dict()
    for name, param in net.named_parameters():
        assert torch.equal(state["master." + name].to(dtype), param)


def test_parameters_over_one_another_step_in_turn() -> None:
    def build(kind: str) -> nn.ModuleDict:
        torch.manual_seed(0)
        net = nn.ModuleDict(
            {"enc": nn.Linear(4, 4, bias=False), "dec": nn.Linear(4, 4, bias=False)}
        )
        data = net["enc"].weight.data
        net["dec"].weight.data = data if kind == "same" else data.t()
        return net

    x = torch.randn(3, 4)
    for kind in ("same", "transposed"):
        for make in (torch.optim.SGD, torch.optim.AdamW):
            net, stock = build(kind), build(kind)
            optimizer = make(stock.parameters(), lr=0.1)
            (stock["dec"](torch.tanh(stock["enc"](x))).sum() / 3).backward()
            optimizer.step()
            accumulator = GradientAccumulator(net, make(net.parameters(), lr=0.1))
            with accumulator.micro_batch(3):
                net["dec"](torch.tanh(net["enc"](x))).sum().backward()
            accumulator.step()
            assert_same_parameters(net, stock)


def test_numbers_from_numpy_stay_fused() -> None:
    numpy = pytest.importorskip("numpy")
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    accumulator = GradientAccumulator(model, optimizer)
    for group in (*optimizer.param_groups, *stock_optimizer.param_groups):
        group["lr"] = numpy.float32(2e-2)
        group["weight_decay"] = numpy.float64(0.1)
    assert accumulator._step._steps[0]._fused_step() is not None
    batches = token_batches((2, 1))
    accumulate_tokens(accumulator, batches)
    accumulator.step()
    stock_window(stock, stock_optimizer, batches)
    assert_same_parameters(model, stock)
