"""torch.compile of the mini-batch operators: one graph, in place, without copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_cases import OPS, nonzero
from optimizer_step_cases import FusedAdam, FusedSgd
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# What a copy of a tensor looks like in Inductor's output: a fresh buffer, or copy_ into one.
_COPIES = re.compile(r"empty_strided_cpu\(|aten\.clone|\.copy_\(|aten\.copy_")


def run_compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    compiled = torch.compile(function, fullgraph=True)
    result, codes = run_and_get_code(compiled, *args)
    return result, "\n".join(codes)


def assert_in_place(code: str, op: str, calls: int = 1) -> None:
    assert len(re.findall(rf"torch_ext\.{op}", code)) >= calls, code
    assert "auto_functionalized" not in code
    assert not _COPIES.search(code), code


def _lists() -> tuple[list[Tensor], list[Tensor]]:
    return [nonzero(3, 4), nonzero(70)], [nonzero(3, 4), nonzero(70, dtype=torch.bfloat16)]


def test_accumulate_into_inputs() -> None:
    accumulators, grads = _lists()
    expected = [a + g.float() for a, g in zip(accumulators, grads, strict=True)]
    pointers = [a.data_ptr() for a in accumulators]
    _, code = run_compiled(lambda a, g: OPS.grad_accumulate_(a, g), accumulators, grads)
    assert_in_place(code, "grad_accumulate_")
    assert [a.data_ptr() for a in accumulators] == pointers
    for accumulator, wanted in zip(accumulators, expected, strict=True):
        assert_same_but_for_rounding(accumulator, wanted)


def test_accumulate_among_other_work() -> None:
    """The gradients are computed in the graph, and the accumulators are used after."""

    def step(accumulators: list[Tensor], values: list[Tensor], scale: Tensor) -> Tensor:
        grads = [v.sin() * 2 for v in values]
        OPS.grad_accumulate_(accumulators, grads, beta=0.5, scale=scale)
        return sum(a.sum() for a in accumulators)

    accumulators, values = _lists()
    plain = [a.clone() for a in accumulators]
    scale = torch.tensor(3.0)
    wanted = step(plain, values, scale)
    pointers = [a.data_ptr() for a in accumulators]
    result, code = run_compiled(step, accumulators, values, scale)
    assert "aten.clone" not in code
    assert "auto_functionalized" not in code
    assert_same_but_for_rounding(result, wanted)
    assert [a.data_ptr() for a in accumulators] == pointers
    for mine, theirs in zip(accumulators, plain, strict=True):
        assert_same_but_for_rounding(mine, theirs)


def test_weight_gradients() -> None:
    weight, bias = nonzero(6, 8), nonzero(6)
    grad, value = nonzero(5, 6), nonzero(5, 8)
    expected = weight + grad.t() @ value, bias + grad.sum(0)
    _, code = run_compiled(OPS.linear_wgrad_, weight, bias, grad, value)
    assert_in_place(code, "linear_wgrad_")
    assert_same_but_for_rounding(weight, expected[0])
    assert_same_but_for_rounding(bias, expected[1])
    table, indices = nonzero(9, 4), torch.tensor([1, 1, 8])
    expected_table = table.index_add(0, indices, torch.ones(3, 4))
    _, code = run_compiled(OPS.embedding_wgrad_, table, indices, torch.ones(3, 4))
    assert_in_place(code, "embedding_wgrad_")
    assert_same_but_for_rounding(table, expected_table)


def test_optimizer_steps() -> None:
    for make in (lambda p: FusedAdam(p, amsgrad=True), lambda p: FusedSgd(p, momentum=0.9)):
        start, grads = [nonzero(3, 4), nonzero(70)], [nonzero(3, 4), nonzero(70)]
        ours, plain = make([t.clone() for t in start]), make([t.clone() for t in start])
        plain.step([g.clone() for g in grads])
        pointers = [t.data_ptr() for t in ours.tensors()]
        _, code = run_compiled(lambda g, ours=ours: ours.step(g), grads)
        assert_in_place(code, "adamw_step_" if isinstance(ours, FusedAdam) else "sgd_step_")
        assert [t.data_ptr() for t in ours.tensors()] == pointers
        for mine, theirs in zip(ours.tensors(), plain.tensors(), strict=True):
            assert torch.equal(mine, theirs)
        assert all(not g.any() for g in grads)
        torch._dynamo.reset()


def test_a_whole_step_is_one_graph() -> None:
    """Norm, clip coefficient and update, as a training loop would have them."""

    def step(params: list[Tensor], accumulators: list[Tensor], max_norm: float) -> Tensor:
        norm, _, found_inf = OPS.grad_stats(accumulators)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        OPS.sgd_step_(
            params, accumulators, [], [], lr=0.1, coefficient=coefficient, found_inf=found_inf
        )
        return norm

    def tensors() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(7)
        return [nonzero(3, 4), nonzero(70)], [nonzero(3, 4), nonzero(70)]

    plain, mine = tensors(), tensors()
    wanted = step(*plain, 0.5)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    norm = compiled(*mine, 0.5)
    assert_same_but_for_rounding(norm, wanted)
    for a, b in zip(mine[0] + mine[1], plain[0] + plain[1], strict=True):
        assert_same_but_for_rounding(a, b)
    mine[1][0].fill_(float("nan"))  # found on the way, without a new graph
    before = [p.clone() for p in mine[0]]
    compiled(*mine, 0.5)
    assert all(torch.equal(p, old) for p, old in zip(mine[0], before, strict=True))
    assert not mine[1][0].any()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_changing_sizes_are_one_graph(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda a, g: OPS.grad_accumulate_(a, g, beta=0.5),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for n in (5, 9, 40):
        accumulator, grad = nonzero(n, 3), nonzero(n, 3)
        wanted = 0.5 * accumulator + grad
        compiled([accumulator], [grad])
        assert_same_but_for_rounding(accumulator, wanted)
    assert counter.frame_count == 1


def test_compiled_gradient_of_the_norm() -> None:
    grads = [nonzero(3, 4).requires_grad_(), nonzero(5).requires_grad_()]
    compiled = torch.compile(lambda g: OPS.grad_stats(g)[0] * 2, fullgraph=True)
    mine = torch.autograd.grad(compiled(grads), grads)
    wanted = torch.autograd.grad(OPS.grad_stats(grads)[0] * 2, grads)
    for a, b in zip(mine, wanted, strict=True):
        assert_same_but_for_rounding(a, b)


def test_backward_that_accumulates_inside_a_compiled_graph() -> None:
    """A weight gradient written by the backward of an autograd function, in a compiled model."""
    accumulator = torch.zeros(3, 4)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(value, weight)
            return value @ weight.t()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            value, weight = ctx.saved_tensors
            OPS.linear_wgrad_(accumulator, None, grad, value)
            return grad @ weight, None

    value, weight = nonzero(5, 4).requires_grad_(), nonzero(3, 4)
    compiled = torch.compile(lambda v, w: Product.apply(v, w).sum(), backend="aot_eager")
    compiled(value, weight).backward()
    assert_same_but_for_rounding(accumulator, torch.ones(3, 5) @ value.detach())


def test_make_fx_records_the_operators() -> None:
    def step(accumulators: list[Tensor], grads: list[Tensor]) -> Tensor:
        OPS.grad_accumulate_(accumulators, grads)
        return OPS.grad_stats(accumulators)[0]

    graph = make_fx(step, tracing_mode="symbolic")(*_lists())
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "torch_ext.grad_accumulate_.default" in targets
    assert "torch_ext.grad_stats.default" in targets
