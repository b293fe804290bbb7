"""Hooks on parameters see in a micro-batch what they see without an accumulator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torch_ext import GradientAccumulator

Seen = list[tuple[str, Tensor | None]]


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embedding(tokens)) * self.scale))


def _plain(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens)


def _checkpointed(model: _Model, tokens: Tensor) -> Tensor:
    return checkpoint(model, tokens, use_reentrant=False)


def _layers_checkpointed(model: _Model, tokens: Tensor) -> Tensor:
    hidden = checkpoint(model.embedding, tokens, use_reentrant=False)
    hidden = checkpoint(model.first, hidden, use_reentrant=False) * model.scale
    return checkpoint(model.second, torch.tanh(hidden), use_reentrant=False)


_FORWARDS: dict[str, Callable[[_Model, Tensor], Tensor]] = {
    "plain": _plain,
    "checkpointed": _checkpointed,
    "layers checkpointed": _layers_checkpointed,
}
_SAVING: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(torch.clone, lambda t: t),
    "detached": lambda: saved_tensors_hooks(torch.detach, lambda t: t),
}


def _post_accumulate(name: str, param: Tensor, seen: Seen) -> Any:
    def hook(param: Tensor) -> None:
        seen.append((name, None if param.grad is None else param.grad.clone()))

    return param.register_post_accumulate_grad_hook(hook)


def _on_gradient(name: str, param: Tensor, seen: Seen) -> Any:
    def hook(grad: Tensor) -> Tensor:
        seen.append((name, grad.clone()))
        return grad * 0.5

    return param.register_hook(hook)


def _on_node(name: str, param: Tensor, seen: Seen) -> Any:
    node = param.view_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def hook(*_: Any) -> None:
        seen.append((name, None if param.grad is None else param.grad.clone()))

    return node, node.register_hook(hook)


_HOOKS = {"post-accumulate": _post_accumulate, "gradient": _on_gradient, "node": _on_node}


def _train(
    accumulates: bool, width: int, forward: str, saving: str, hook: str
) -> tuple[Seen, list[Tensor]]:
    torch.manual_seed(0)
    model = _Model(width)
    seen: Seen = []
    # As accumulator's, so that our own hooks come before and after: kept alive by this list.
    held = [_HOOKS[hook](name, param, seen) for name, param in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = GradientAccumulator(model, optimizer) if accumulates else None
    held += [_HOOKS[hook](f"{n} again", p, seen) for n, p in model.named_parameters()]
    tokens = torch.arange(6).reshape(2, 3)
    with accumulator.micro_batch() if accumulator is not None else nullcontext():
        with _SAVING[saving]():
            loss = _FORWARDS[forward](model, tokens).square().sum()
        loss.backward()
    if accumulator is None:
        optimizer.step()
    else:
        accumulator.step()
    assert held
    return seen, [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("hook", _HOOKS)
@pytest.mark.parametrize("saving", _SAVING)
@pytest.mark.parametrize("forward", _FORWARDS)
@pytest.mark.parametrize("width", [8, 300], ids=["small", "large"])
def test_hooks_see_what_stock_shows_them(width: int, forward: str, saving: str, hook: str) -> None:
    seen, params = _train(True, width, forward, saving, hook)
    expected, expected_params = _train(False, width, forward, saving, hook)
    assert sorted(name for name, _ in seen) == sorted(name for name, _ in expected)
    values = dict(expected)
    for name, value in seen:
        assert value is not None, name
        assert_same_but_for_rounding(value, values[name])
    assert_same_but_for_rounding(params, expected_params)


def test_a_hook_that_comes_later_finds_the_others_gradients() -> None:
    """A large gradient that somebody waits for stays in .grad until the micro-batch ends."""
    torch.manual_seed(0)
    model = _Model(300)
    found: list[bool] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: None)
    model.embedding.weight.register_post_accumulate_grad_hook(
        lambda _: found.append(all(param.grad is not None for param in model.parameters()))
    )
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accumulator.micro_batch():
        model(torch.arange(6).reshape(2, 3)).sum().backward()
    assert found == [True]
    assert accumulator.micro_batches == 1
