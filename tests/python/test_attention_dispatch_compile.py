"""torch.compile, export, AOTInductor and make_fx: one graph, the same results, any sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

OPS = torch.ops.torch_ext

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return OPS.scaled_dot_product_attention(*args, **kwargs)


def _inputs(batch: int = 2, q_len: int = 5, kv_len: int = 7, kv_heads: int = 4) -> list[Tensor]:
    shapes = [(batch, 4, q_len, 8), (batch, kv_heads, kv_len, 8), (batch, kv_heads, kv_len, 8)]
    return [torch.randn(s, requires_grad=True) for s in shapes]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """With work around it, as in a model: views before, a merge of heads after."""
    out = sdpa(query * 1.5, key, value, mask)
    return out.transpose(1, 2).flatten(2).relu()


def _compare(compiled: Any, function: Any, inputs: list[Tensor]) -> None:
    leaves = [t for t in inputs if t.requires_grad]
    out, expected = compiled(*inputs), function(*inputs)
    assert out.dtype == expected.dtype
    assert out.stride() == expected.stride()
    assert_same_but_for_rounding(out, expected)
    actual = torch.autograd.grad(out.sin().sum(), leaves)
    grads = torch.autograd.grad(expected.sin().sum(), leaves)
    for mine, plain in zip(actual, grads, strict=True):
        assert mine.stride() == plain.stride()
        assert_same_but_for_rounding(mine, plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("mask", [None, "additive", "bool"])
def test_fullgraph(mask: str | None, backend: str) -> None:
    if backend == "inductor" and mask == "bool":
        mask = "additive_row"
    inputs: list[Any] = _inputs()
    if mask == "additive":
        inputs.append(torch.randn(4, 5, 7, requires_grad=True))
    elif mask == "additive_row":
        inputs.append(torch.randn(2, 1, 1, 7, requires_grad=True))
    elif mask == "bool":
        inputs.append(torch.rand(5, 7) < 0.7)
    _compare(torch.compile(_attend, fullgraph=True, backend=backend), _attend, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_changing_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_attend, fullgraph=True, backend=counter, dynamic=True)
    for batch, q_len, kv_len in ((2, 5, 7), (3, 6, 9), (4, 33, 65), (5, 130, 3)):
        _compare(compiled, _attend, [*_inputs(batch, q_len, kv_len), torch.randn(4, q_len, kv_len)])
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes_compile_twice() -> None:
    """Without dynamic=True the first change of sizes recompiles once, later ones do not."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), backend=counter)
    for q_len in (5, 6, 9, 21):
        query, key, value = (t.detach() for t in _inputs(2, q_len, q_len))
        assert_same_but_for_rounding(
            compiled(query, key, value), sdpa(query, key, value, is_causal=True)
        )
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["gqa", "head_dim", "causal_offset", "padding", "heads", "packed"])
def test_every_size_may_be_symbolic(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    functions: dict[str, Any] = {
        "gqa": lambda q, k: sdpa(q, k, k, enable_gqa=True),
        "head_dim": lambda q, k: sdpa(q, k, k),
        "causal_offset": lambda q, k: OPS.attention_forward(
            q, k, k, is_causal=True, causal_offset=k.size(-2) - q.size(-2)
        )[0],
        "padding": lambda q, k, p: OPS.attention_forward(q, k, k, key_padding_mask=p)[0],
        "heads": lambda q, k: sdpa(q, k, k),
        "packed": lambda q: OPS.packed_attention_forward(q, 2)[0],
    }

    def arguments(n: int) -> list[Tensor]:
        shapes: dict[str, list[tuple[int, ...]]] = {
            "gqa": [(2, 4, n, 8), (2, 2, n + 3, 8)],
            "head_dim": [(2, 4, 5, n), (2, 4, 7, n)],
            "causal_offset": [(2, 4, n, 8), (2, 4, 2 * n, 8)],
            "padding": [(n, 4, 5, 8), (n, 4, n + 3, 8)],
            "heads": [(2, n, 5, 8), (2, n, 7, 8)],
            "packed": [(2, n, 24)],
        }
        tensors = [torch.randn(s, requires_grad=True) for s in shapes[name]]
        return [*tensors, torch.rand(n, n + 3) < 0.3] if name == "padding" else tensors

    function = functions[name]
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for n in (6, 9, 40):
        _compare(compiled, function, arguments(n))
    # head_dim is in the default scale, a Python number: it may be specialised, nothing else.
    assert counter.frame_count == 1 or (name == "head_dim" and counter.frame_count <= 3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout(backend: str) -> None:
    """Drawn anew by each call, from the seed that torch.manual_seed sets; backward agrees."""
    inputs = _inputs(2, 40, 40)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value, dropout_p=0.4)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.manual_seed(1)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(1)
    again = compiled(*inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    # The gradient of the value shows the mask: out = (P * keep) @ value is linear in it.
    (grad,) = torch.autograd.grad(first.sum(), inputs[2:])
    assert_same_but_for_rounding((grad * inputs[2]).sum(-2), first.sum(-2))
    zero = (second == 0).float().mean()
    assert zero < 0.01


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast(backend: str) -> None:
    """The dtype that F.scaled_dot_product_attention has, compiled and not."""
    query, key, value = _inputs()

    def run(op: Any) -> Any:
        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return op(query, key, value)

        return function

    stock = torch.compile(run(F.scaled_dot_product_attention), backend=backend)(query, key, value)
    out = torch.compile(run(sdpa), fullgraph=True, backend=backend)(query, key, value)
    eager = run(sdpa)(query, key, value)
    assert out.dtype == eager.dtype == stock.dtype == torch.bfloat16
    assert_same_but_for_rounding(out, eager)
    grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert all(g.dtype is torch.float32 for g in grads)


def test_autocast_around_the_compiled_call() -> None:
    inputs = _inputs()
    compiled = torch.compile(lambda *t: sdpa(*t), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*inputs).dtype is torch.bfloat16
    assert compiled(*inputs).dtype is torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_strides_survive(backend: str) -> None:
    """Transposed heads in, stride-0 gradients out: fake strides that lie would show here."""
    base = torch.randn(2, 9, 3, 4, 8, requires_grad=True)

    def function(base: Tensor) -> Tensor:
        query, key, value = base.transpose(1, 3).unbind(2)
        return sdpa(query, key, value, is_causal=True).sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    (actual,) = torch.autograd.grad(compiled(base), base)
    (expected,) = torch.autograd.grad(function(base), base)
    assert_same_but_for_rounding(actual, expected)


def test_self_attention_compiles() -> None:
    arguments = [
        torch.randn(s, requires_grad=True) for s in ((2, 5, 12), (36, 12), (36,), (12, 12), (12,))
    ]

    def function(*tensors: Tensor) -> Tensor:
        return OPS.self_attention(*tensors, 3, is_causal=True)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 8, 11):
        arguments[0] = torch.randn(2, length, 12, requires_grad=True)
        out, expected = compiled(*arguments), function(*arguments)
        assert_same_but_for_rounding(out, expected)
        for mine, plain in zip(
            torch.autograd.grad(out.sum(), arguments),
            torch.autograd.grad(expected.sum(), arguments),
            strict=True,
        ):
            assert_same_but_for_rounding(mine, plain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_autograd(backend: str) -> None:
    """The backward pass is traced too, with the seed and logsumexp as graph inputs."""
    import torch._dynamo.compiled_autograd as compiled_autograd

    inputs: list[Tensor] = [*_inputs(), torch.randn(5, 7, requires_grad=True)]
    seed = torch.tensor([5])

    def loss() -> Tensor:
        out, logsumexp = OPS.attention_forward(*inputs, dropout_p=0.2, dropout_seed=seed)
        return out.sin().sum() + logsumexp.sum()

    loss().backward()
    expected = [t.grad for t in inputs]
    for tensor in inputs:
        tensor.grad = None
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss().backward()
    for tensor, grad in zip(inputs, expected, strict=True):
        assert_same_but_for_rounding(tensor.grad, grad)


def test_compiled_autograd_of_only_the_output() -> None:
    import torch._dynamo.compiled_autograd as compiled_autograd

    inputs = _inputs()
    expected = torch.autograd.grad(sdpa(*inputs).sum(), inputs)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        sdpa(*inputs).sum().backward()
    for tensor, grad in zip(inputs, expected, strict=True):
        assert_same_but_for_rounding(tensor.grad, grad)


def test_checkpoint_in_a_compiled_function() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = _inputs(2, 40, 40)

    def function(*tensors: Tensor) -> Tensor:
        return checkpoint(
            lambda q, k, v: sdpa(q.sin(), k, v, dropout_p=0.3), *tensors, use_reentrant=False
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs)
    (grad,) = torch.autograd.grad(out.sum(), inputs[2:])
    assert_same_but_for_rounding((grad * inputs[2]).sum(-2), out.sum(-2))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: str) -> None:
    inputs = [t.detach() for t in _inputs()]

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        query = query.clone().requires_grad_()
        out = sdpa(query, key, value)
        return out.detach(), *torch.autograd.grad(out.sum(), [query])

    graph = make_fx(function, tracing_mode=tracing_mode)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "torch_ext.attention_forward.default" in names
    assert "torch_ext.attention_backward.default" in names
    other = inputs
    if tracing_mode == "symbolic":
        other = [torch.randn(3, 4, n, 8) for n in (6, 9, 9)]
    for mine, plain in zip(graph(*other), function(*other), strict=True):
        assert_same_but_for_rounding(mine, plain)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return sdpa(*heads.unbind(0), mask).transpose(1, 2).flatten(2)


def _exported() -> tuple[_Block, Any]:
    block = _Block()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    program = torch.export.export(
        block,
        (torch.randn(2, 9, 32), torch.randn(9, 9)),
        dynamic_shapes={"x": {0: batch, 1: length}, "mask": {0: length, 1: length}},
    )
    return block, program


def test_export(tmp_path: Path) -> None:
    """Exported with symbolic batch and length, saved, loaded, decomposed, run."""
    block, program = _exported()
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    decomposed = loaded.run_decompositions()
    targets = {str(node.target) for node in decomposed.graph.nodes}
    assert "torch_ext.attention_forward.default" in targets
    for batch, length in ((2, 9), (3, 21)):
        inputs = (torch.randn(batch, length, 32), torch.randn(length, length))
        for exported in (program, loaded, decomposed):
            assert_same_but_for_rounding(exported.module()(*inputs), block(*inputs))


def test_aot_inductor(tmp_path: Path) -> None:
    block, program = _exported()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "block.pt2")
        )
        compiled = torch._inductor.aoti_load_package(package)
        for batch, length in ((2, 9), (3, 21)):
            inputs = (torch.randn(batch, length, 32), torch.randn(length, length))
            assert_same_but_for_rounding(compiled(*inputs), block(*inputs))
