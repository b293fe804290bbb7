"""Autograd's machinery around the operators: versions, hooks, checkpoints, modes, forward mode."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

OPS = torch.ops.torch_ext


def _qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7)]


SAVED = [
    "query",
    "key",
    "value",
    "attn_mask",
    "key_padding_mask",
    "dropout_seed",
    "out",
    "logsumexp",
]


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("boolean", [False, True], ids=["additive", "bool"])
def test_saved_tensor_modified_in_place(name: str, boolean: bool) -> None:
    """Each variable that backward reads raises when it has been written to in between.

    Boolean masks are kept as copies; so is out where stock keeps none, as with dropout.
    """
    tensors = dict(zip(("query", "key", "value"), _qkv(), strict=True))
    tensors["attn_mask"] = (
        torch.rand(5, 7) < 0.9 if boolean else torch.randn(5, 7, requires_grad=True)
    )
    tensors["key_padding_mask"] = torch.zeros(2, 7, dtype=torch.bool)
    tensors["dropout_seed"] = torch.tensor([3])
    out, logsumexp = OPS.attention_forward(**tensors, dropout_p=0.2)
    loss = out.sum() + logsumexp.sum()
    with torch.no_grad():
        {**tensors, "out": out, "logsumexp": logsumexp}[name].zero_()
    if name in ("out", "key_padding_mask") or (name == "attn_mask" and boolean):
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_modified_in_place_is_tracked() -> None:
    """An in-place operation on the output joins the graph, as on any other output; what backward
    reads of it is then gone."""
    inputs = _qkv()
    out = OPS.scaled_dot_product_attention(*inputs)
    assert out._version == 0
    out.mul_(2)
    assert out._version == 1
    assert "Mul" in out.grad_fn.name()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_not_written() -> None:
    inputs = [*_qkv(), torch.randn(5, 7, requires_grad=True)]
    copies = [t.detach().clone() for t in inputs]
    OPS.scaled_dot_product_attention(*inputs).sum().backward()
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == 0


def test_graph_is_freed() -> None:
    out = OPS.scaled_dot_product_attention(*_qkv())
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_grad_fn_and_leaves() -> None:
    inputs = _qkv()
    out, logsumexp = OPS.attention_forward(*inputs)
    assert out.requires_grad
    assert logsumexp.requires_grad
    assert out.grad_fn is logsumexp.grad_fn
    with torch.no_grad():
        assert OPS.scaled_dot_product_attention(*inputs).grad_fn is None
    assert not OPS.scaled_dot_product_attention(*(t.detach() for t in inputs)).requires_grad


def test_gradients_accumulate() -> None:
    inputs = _qkv()
    for _ in range(2):
        OPS.scaled_dot_product_attention(*inputs).sum().backward()
    twice = [t.grad for t in inputs]
    once = torch.autograd.grad(OPS.scaled_dot_product_attention(*inputs).sum(), inputs)
    for total, single in zip(twice, once, strict=True):
        assert_same_but_for_rounding(total, 2 * single)


def test_the_same_tensor_thrice() -> None:
    tensor = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: OPS.scaled_dot_product_attention(t, t, t, is_causal=True), [tensor]
    )


def test_inference_mode() -> None:
    inputs = _qkv()
    plain = OPS.scaled_dot_product_attention(*inputs)
    with torch.inference_mode():
        out = OPS.scaled_dot_product_attention(*inputs)
        assert out.is_inference()
        assert not out.requires_grad
        fresh = torch.randn(2, 3, 5, 8)
        assert OPS.scaled_dot_product_attention(fresh, *inputs[1:]).is_inference()
    assert torch.equal(out, plain)
    # Outside, an inference tensor may be read but not saved for a gradient.
    OPS.scaled_dot_product_attention(fresh, *(t.detach() for t in inputs[1:]))
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
        OPS.scaled_dot_product_attention(fresh, *inputs[1:])


def test_saved_tensors_hooks() -> None:
    inputs = [*_qkv(), torch.randn(5, 7, requires_grad=True)]
    expected = torch.autograd.grad(OPS.scaled_dot_product_attention(*inputs).sum(), inputs)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        out = OPS.scaled_dot_product_attention(*inputs)
    # query, key, value, mask, out, logsumexp
    assert len(packed) == 6
    for mine, plain in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        assert torch.equal(mine, plain)


def test_save_on_cpu() -> None:
    inputs = _qkv()
    expected = torch.autograd.grad(OPS.scaled_dot_product_attention(*inputs).sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        out = OPS.scaled_dot_product_attention(*inputs)
    for mine, plain in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        assert torch.equal(mine, plain)


def test_node_hooks() -> None:
    inputs = _qkv()
    out = OPS.scaled_dot_product_attention(*inputs)
    seen: list[int] = []
    out.grad_fn.register_hook(lambda grads_in, grads_out: seen.append(len(grads_out)))
    out.register_hook(lambda grad: 2 * grad)
    out.sum().backward()
    doubled = [t.grad for t in inputs]
    plain = torch.autograd.grad(OPS.scaled_dot_product_attention(*inputs).sum(), inputs)
    assert len(seen) == 1
    for mine, single in zip(doubled, plain, strict=True):
        assert_same_but_for_rounding(mine, 2 * single)


class _Calls(TorchDispatchMode):
    """How often each of torch_ext's operators runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "torch_ext":
            name = func._schema.name.removeprefix("torch_ext::")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    inputs = _qkv()

    def block(*tensors: Tensor) -> Tensor:
        return OPS.scaled_dot_product_attention(*tensors).sin()

    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    with _Calls() as calls:
        checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()
    assert calls.counts == {"attention_forward": 2, "attention_backward": 1}
    for tensor, grad in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_selective_checkpoint() -> None:
    """The attention is kept, all around it recomputed."""
    inputs = _qkv()

    def block(*tensors: Tensor) -> Tensor:
        return OPS.scaled_dot_product_attention(tensors[0].sin(), *tensors[1:], None, 0.3).sin()

    def contexts():  # type: ignore[no-untyped-def]
        return create_selective_checkpoint_contexts([OPS.attention_forward.default])

    torch.manual_seed(1)
    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    torch.manual_seed(1)
    with _Calls() as calls:
        out = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
        out.sum().backward()
    assert calls.counts == {"attention_forward": 1, "attention_backward": 1}
    for tensor, grad in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_dispatch_mode_sees_every_call() -> None:
    """Also the ones that need no gradient, which otherwise take a short cut."""
    query, key, value = (t.detach() for t in _qkv())
    with _Calls() as calls:
        OPS.scaled_dot_product_attention(query, key, value)
    assert calls.counts == {"attention_forward": 1}


def test_deterministic_algorithms() -> None:
    inputs = _qkv()
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            torch.manual_seed(1)
            out = OPS.scaled_dot_product_attention(*inputs, dropout_p=0.2)
            results.append([out, *torch.autograd.grad(out.sum(), inputs)])
        finally:
            torch.use_deterministic_algorithms(False)
    for mine, plain in zip(*results, strict=True):
        assert torch.equal(mine, plain)


FORWARD_MODE = "forward-mode automatic differentiation is not supported"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_dual_tensors_raise(index: int, requires_grad: bool) -> None:
    """Never silently zero tangents, whichever input has one."""
    inputs = [*(t.detach() for t in _qkv()), torch.randn(5, 7)]
    inputs = [t.requires_grad_(requires_grad) for t in inputs]
    with fwAD.dual_level():
        inputs[index] = fwAD.make_dual(inputs[index], torch.randn_like(inputs[index]))
        for op in (OPS.scaled_dot_product_attention, OPS.attention_forward):
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                op(*inputs)


@pytest.mark.parametrize("index", range(5))
def test_dual_tensors_raise_in_self_attention(index: int) -> None:
    arguments = [torch.randn(shape) for shape in ((2, 5, 12), (36, 12), (36,), (12, 12), (12,))]
    with fwAD.dual_level():
        arguments[index] = fwAD.make_dual(arguments[index], torch.randn_like(arguments[index]))
        if index < 3:
            with pytest.raises(NotImplementedError, match=FORWARD_MODE):
                OPS.self_attention(*arguments, 3)
        else:  # the output projection is torch's own, and has a forward mode
            assert fwAD.unpack_dual(OPS.self_attention(*arguments, 3)).tangent.any()


def test_dual_tensors_raise_in_backward() -> None:
    query, key, value = (t.detach() for t in _qkv())
    out, logsumexp = OPS.attention_forward(query, key, value)
    with fwAD.dual_level():
        dual = fwAD.make_dual(out, torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            OPS.attention_backward(dual, None, query, key, value, out, logsumexp)


def test_packed_saved_tensor_modified_in_place() -> None:
    for name in ("qkv", "out", "logsumexp", "mask"):
        qkv = torch.randn(2, 5, 36, requires_grad=True)
        mask = torch.randn(5, 5, requires_grad=True)
        out, logsumexp = OPS.packed_attention_forward(qkv, 3, mask)
        with torch.no_grad():
            {"qkv": qkv, "out": out, "logsumexp": logsumexp, "mask": mask}[name].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, (qkv, mask), torch.ones_like(out))
