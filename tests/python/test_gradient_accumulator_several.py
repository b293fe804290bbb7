"""One optimizer over several models, and several optimizers over one model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accumulation_models import assert_same_parameters
from torch import Tensor, nn

from torch_ext import GradientAccumulator


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(20, 8), nn.Linear(8, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 20)
    )


def _muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("0.")]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-2)]


def _batches(window: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(window)
    return [
        tuple(torch.randint(20, (size,), generator=generator) for _ in range(2))  # type: ignore
        for size in (3, 6, 2)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_and_adamw_train_one_model(dtype: torch.dtype) -> None:
    model = _model().to(dtype)
    stock = copy.deepcopy(model)
    optimizers, stock_optimizers = _muon_and_adamw(model), _muon_and_adamw(stock)
    accumulator = GradientAccumulator(model, optimizers, max_norm=0.5)
    assert accumulator.optimizer == optimizers
    for window in range(3):
        batches = _batches(window)
        for tokens, targets in batches:
            with accumulator.micro_batch(len(tokens)):
                F.cross_entropy(model(tokens).float(), targets, reduction="sum").backward()
        accumulator.step()
        for one in stock_optimizers:
            one.zero_grad()
        tokens, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        F.cross_entropy(stock(tokens).float(), targets).backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
        for one in stock_optimizers:
            one.step()
    # Muon orthogonalises in bf16, where a rounding of its input shows.
    assert_same_parameters(model, stock, torch.bfloat16)
    if dtype == torch.bfloat16:
        masters = [key for key in accumulator.state_dict() if key.startswith("master.")]
        assert len(masters) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_one_optimizer_trains_a_model_and_its_loss(kind: Any) -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, out: Tensor) -> Tensor:
            return (out.square() * self.scale.exp() - self.scale).sum()

    torch.manual_seed(0)
    models = [nn.Linear(3, 2), Criterion()]
    stock = copy.deepcopy(models)
    params = [param for model in models for param in model.parameters()]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    accumulator = GradientAccumulator(kind(models), optimizer)
    assert list(accumulator.model) == models  # type: ignore[call-overload]
    assert {"shape.0.weight", "shape.0.bias", "shape.1.scale"} <= accumulator.state_dict().keys()
    x = torch.randn(6, 3)
    for part in (x[:2], x[2:]):
        with accumulator.micro_batch(len(part)):
            models[1](models[0](part)).backward()
    accumulator.step()
    (stock[1](stock[0](x)) / 6).backward()
    torch.optim.AdamW([p for model in stock for p in model.parameters()], lr=0.1).step()
    for mine, theirs in zip(models, stock, strict=True):
        assert_same_parameters(mine, theirs)


def test_a_scaler_serves_several_optimizers() -> None:
    model = _model()
    optimizers = _muon_and_adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    accumulator = GradientAccumulator(model, optimizers)
    for factor, scale in ((1.0, 128.0), (float("inf"), 64.0), (1.0, 128.0)):
        before = copy.deepcopy(model)
        for tokens, targets in _batches(0):
            with accumulator.micro_batch(len(tokens)):
                loss = F.cross_entropy(model(tokens), targets, reduction="sum") * factor
                scaler.scale(loss).backward()
        accumulator.step(scaler)
        scaler.update()
        assert scaler.get_scale() == scale
        same = all(map(torch.equal, model.parameters(), before.parameters()))
        assert same is accumulator.step_was_skipped is (factor != 1.0)


def test_refusals() -> None:
    model = _model()
    muon, adamw = _muon_and_adamw(model)
    with pytest.raises(ValueError, match=r"without 0\.weight and 4 more: give a list of opti"):
        GradientAccumulator(model, muon)
    with pytest.raises(ValueError, match=r"share no parameters, got two that hold 1\.weight"):
        GradientAccumulator(model, [muon, adamw, torch.optim.SGD(model[1].parameters())])
    with pytest.raises(ValueError, match=r"only, got others: .* give a list of models"):
        GradientAccumulator(model[1], torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizer takes .*, or several, got str"):
        GradientAccumulator(model, [muon, "adamw"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"model takes an nn\.Module, or several, got int"):
        GradientAccumulator([model, 1], muon)  # type: ignore[list-item]


def test_the_former_name_of_add_in_backward_warns() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.warns(DeprecationWarning, match="fuse_linear is called add_in_backward now"):
        accumulator = GradientAccumulator(layer, optimizer, fuse_linear=False)
    with accumulator.micro_batch():
        layer(torch.ones(1, 3)).sum().backward()
        assert layer.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientAccumulator(layer, optimizer, add_in_backward=False)
