"""Which forward an accumulator may take the place of, and that nothing else changes by it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accumulation_models import assert_same_parameters
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torch_ext import GradientAccumulator


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _accumulator(model: nn.Module, **options: Any) -> GradientAccumulator:
    return GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def _step(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


_own_linear_forward = nn.Linear.forward
_own_embedding_forward = nn.Embedding.forward
_own_linear = F.linear
_own_embedding = F.embedding
_own_torch_embedding = torch.embedding

_PATCHES: dict[str, tuple[Any, str, Callable[..., Tensor]]] = {
    "Linear.forward": (nn.Linear, "forward", lambda s, x: _own_linear_forward(s, x) * 2),
    "F.linear": (F, "linear", lambda *a: _own_linear(*a) * 2),
    "Embedding.forward": (nn.Embedding, "forward", lambda s, x: _own_embedding_forward(s, x) * 2),
    "F.embedding": (F, "embedding", lambda *a, **k: _own_embedding(*a, **k) * 2),
    "torch.embedding": (torch, "embedding", lambda *a: _own_torch_embedding(*a) * 2),
}


@pytest.mark.parametrize("when", ["before", "after", "inside"])
@pytest.mark.parametrize("patch", _PATCHES)
def test_a_patched_layer_stays_patched(
    patch: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), *_net())
    stock = copy.deepcopy(model)
    tokens = torch.tensor([1, 2, 2, 8])

    def apply() -> None:
        owner, name, function = _PATCHES[patch]
        monkeypatch.setattr(owner, name, function)

    if when == "before":
        apply()
    accumulator = _accumulator(model)
    if when == "after":
        apply()
    with accumulator.micro_batch(4):
        if when == "inside":
            apply()
        out = model(tokens)
        out.sum().backward()
    accumulator.step()
    expected = stock(tokens)
    (expected.sum() / 4).backward()
    _step(stock)
    assert torch.equal(out, expected)
    assert_same_parameters(model, stock)


@pytest.mark.parametrize("all_double", [True, False])
def test_float64_layers_keep_their_dtype_under_autocast(all_double: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1).double())
    net = net.double() if all_double else net
    stock = copy.deepcopy(net)
    x = torch.randn(4, 6, dtype=torch.float64 if all_double else torch.float32)

    def forward(model: nn.Module) -> Tensor:
        return model[2](model[1](model[0](x)).double())

    accumulator = _accumulator(net)
    with torch.autocast("cpu", torch.bfloat16):
        expected = forward(stock)
        with accumulator.micro_batch(4):
            out = forward(net)
            out.sum().backward()
    accumulator.step()
    (expected.sum() / 4).backward()
    _step(stock)
    assert out.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    # The float32 layer's gradient is not rounded to bf16 on its way, as torch's is.
    assert_same_parameters(net, stock, None if all_double else torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "input", "autocast"),
    [
        (torch.float32, torch.float64, False),
        (torch.float32, torch.float64, True),
        (torch.float64, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.int64, True),
        (torch.float32, torch.int64, False),
    ],
)
def test_dtypes_that_do_not_match_are_refused_as_by_torch(
    weight: torch.dtype, input: torch.dtype, autocast: bool
) -> None:
    layer = nn.Linear(6, 2, dtype=weight)
    x = torch.ones(3, 6, dtype=input)
    errors = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for context in (contextlib.nullcontext(), _accumulator(layer).micro_batch()):
            with pytest.raises(RuntimeError) as error, context:
                layer(x)
            errors.append(str(error.value).split("\n")[0])
    assert errors[0] == errors[1]


def _embedding(padding_idx: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4, padding_idx=padding_idx))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.embedding(tokens)
        with torch.no_grad():
            self.embedding.weight.clamp_(-0.5, 0.5)
        return first + self.embedding(tokens)


def _renormalise(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.div_(param.norm(dim=1, keepdim=True))


_TOKENS = torch.tensor([1, 5, 5])
_INPUT = torch.linspace(-1, 1, 20).view(5, 4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("build", "input", "write"),
    [
        (_embedding, _TOKENS, _renormalise),
        (lambda: _embedding(0), _TOKENS, lambda m: m[0].weight.detach()[0].zero_()),
        (_Twice, _TOKENS, lambda m: None),
        (lambda: nn.Sequential(nn.Linear(4, 3)), _INPUT, _renormalise),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), _INPUT, _renormalise),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
            _INPUT,
            lambda m: m[0].bias.detach().add_(1),
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
            _INPUT,
            lambda m: m[1].weight.data.mul_(2),
        ),
    ],
    ids=["embedding", "padding row", "between", "first linear", "linear", "bias", "data"],
)
def test_weights_written_between_forward_and_backward(
    build: Callable[[], nn.Module], input: Tensor, write: Callable[[Any], None], autocast: bool
) -> None:
    torch.manual_seed(0)
    model = build()
    stock = copy.deepcopy(model)

    def run(net: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(input).square().sum()
        write(net)
        loss.backward()

    error = None
    try:
        run(stock)
    except RuntimeError as raised:
        error = str(raised)
    accumulator = _accumulator(model)
    if error is not None:
        assert "modified by an inplace operation" in error
        with (
            pytest.raises(RuntimeError, match="modified by an inplace operation"),
            accumulator.micro_batch(),
        ):
            run(model)
        return
    with accumulator.micro_batch():
        run(model)
    accumulator.step()
    _step(stock)
    assert_same_parameters(model, stock, torch.bfloat16 if autocast else None)


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding = nn.Embedding(9, 4)
        self.first = nn.Linear(4, 4, bias=bias)
        self.second = nn.Linear(4, 4, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        def block(hidden: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(hidden))) + self.embedding(tokens)

        hidden = self.embedding(tokens)
        if self.reentrant is None:
            return block(hidden)
        return checkpoint(block, hidden, use_reentrant=self.reentrant)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_forward_begun_outside(
    reentrant: bool | None, tokens: tuple[int, ...], bias: bool, autocast: bool
) -> None:
    model = _Checkpointed(reentrant, bias)
    stock = copy.deepcopy(model)
    batch = torch.arange(torch.Size(tokens).numel()).remainder(9).view(tokens)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    accumulator = _accumulator(model)
    with cast:
        loss = model(batch).square().sum()
    with accumulator.micro_batch():
        loss.backward()
    accumulator.step()
    with cast:
        loss = stock(batch).square().sum()
    loss.backward()
    _step(stock)
    assert_same_parameters(model, stock, torch.bfloat16 if autocast else None)
    # And the other way round: a forward inside, whose backward is the caller's own.
    with accumulator.micro_batch(), cast:
        loss = model(batch).square().sum()
    with cast:
        stock_loss = stock(batch).square().sum()
    loss.backward()
    stock.zero_grad()
    stock_loss.backward()
    assert_same_but_for_rounding(
        [param.grad for param in model.parameters()],
        [param.grad for param in stock.parameters()],
        torch.bfloat16 if autocast else None,
    )


@pytest.mark.parametrize("autocast", [False, True])
# Without a bias torch makes one vector's product a matrix-vector product, and keeps the vector.
@pytest.mark.parametrize(
    ("shape", "bias"),
    [((5, 4), True), ((5, 4), False), ((2, 5, 4), True), ((2, 5, 4), False), ((4,), True)],
    ids=str,
)
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_backward_keeps_what_torchs_own_keeps(
    shape: tuple[int, ...], bias: bool, input_needs_grad: bool, autocast: bool
) -> None:
    layer = nn.Linear(4, 3, bias=bias)
    x = torch.randn(shape, requires_grad=input_needs_grad)
    accumulator = _accumulator(layer)
    kept: list[list[tuple[Any, ...]]] = []
    for context in (_nothing(), accumulator.micro_batch()):
        own: list[tuple[Any, ...]] = []

        def pack(tensor: Tensor, own: list[tuple[Any, ...]] = own) -> Tensor:
            own.append((tensor.shape, tensor.stride(), tensor.dtype))
            return tensor

        with (
            context,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            out = layer(x)
        kept.append(own)
        del out
    assert kept[0] == kept[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives_are_torchs(autocast: bool) -> None:
    model = _net()
    stock = copy.deepcopy(model)
    accumulator = _accumulator(model)
    grads = []
    for net, context in ((model, accumulator.micro_batch()), (stock, _nothing())):
        x = torch.linspace(-1, 1, 30).view(2, 3, 5).requires_grad_()
        with context:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = net(x)
            (first,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
            grads.append(
                torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)
            )
    assert [one is None for one in grads[0]] == [one is None for one in grads[1]]
    ours, theirs = ([one for one in given if one is not None] for given in grads)
    assert_same_but_for_rounding(ours, theirs, torch.bfloat16 if autocast else None)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_flops_of_a_micro_batch_are_torchs(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), *_net())
    tokens = torch.arange(6).view(2, 3)
    counts = []
    for context in (_nothing(), _accumulator(model).micro_batch()):
        with context, FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(tokens)
            out.float().sum().backward()
        counts.append(counter.get_total_flops())
    model.zero_grad()
    assert counts[0] == counts[1] > 0
