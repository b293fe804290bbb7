"""The mini-batch operators in PyTorch's dispatcher: versions, inference mode, meta, functorch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from accumulation_cases import DTYPES, OPS, dtype_id, nonzero
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch.library import opcheck

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _pair(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nonzero(3, 4, dtype=dtype), nonzero(5, dtype=dtype)]


def _adamw(amsgrad: bool = False, master: bool = False, **options: Any) -> Call:
    states = [[t.abs() for t in _pair()] for _ in range(4)]
    args = (
        *states,
        [t.abs() for t in _pair()] if amsgrad else [],
        _pair() if master else [],
        [torch.tensor(1.0), torch.tensor(2.0)],
    )
    options = {"lr": 0.1, "amsgrad": amsgrad, **options}
    overload = "tensor_lr" if isinstance(options["lr"], Tensor) else "default"
    return getattr(OPS.adamw_step_, overload), args, options


def _sgd(momentum: float = 0.0, master: bool = False, **options: Any) -> Call:
    args = (_pair(), _pair(), _pair() if momentum else [], _pair() if master else [])
    options = {"lr": 0.1, "momentum": momentum, **options}
    overload = "tensor_lr" if isinstance(options["lr"], Tensor) else "default"
    return getattr(OPS.sgd_step_, overload), args, options


def _accumulate(**options: Any) -> Call:
    return OPS.grad_accumulate_.default, (_pair(), _pair(torch.bfloat16)), options


def _wgrad(bias: bool, **options: Any) -> Call:
    args = (nonzero(3, 4), nonzero(3) if bias else None, nonzero(2, 5, 3), nonzero(2, 5, 4))
    return OPS.linear_wgrad_.default, args, options


def _embedding(**options: Any) -> Call:
    args = (nonzero(6, 4), torch.randint(6, (2, 5)), nonzero(2, 5, 4))
    return OPS.embedding_wgrad_.default, args, options


CALLS: dict[str, Callable[[], Call]] = {
    "accumulate": _accumulate,
    "accumulate_scaled": lambda: _accumulate(beta=0.5, scale=torch.tensor(2.0)),
    "accumulate_overwrite": lambda: _accumulate(beta=0.0),
    "stats": lambda: (OPS.grad_stats.default, ([*_pair(), nonzero(2).double()],), {}),
    "wgrad": lambda: _wgrad(True),
    "wgrad_without_bias": lambda: _wgrad(False, beta=0.0),
    "embedding": _embedding,
    "embedding_options": lambda: _embedding(padding_idx=2, scale_grad_by_freq=True, beta=0.0),
    "adamw": _adamw,
    "adamw_full": lambda: _adamw(
        True, True, maximize=True, coefficient=torch.tensor(0.5), found_inf=torch.tensor(0.0)
    ),
    "adamw_tensor_lr": lambda: _adamw(lr=torch.tensor(0.1), decoupled=False, weight_decay=0.1),
    "sgd": _sgd,
    "sgd_full": lambda: _sgd(
        0.9, True, nesterov=True, first_step=[True, False], coefficient=torch.tensor(0.5)
    ),
    "sgd_tensor_lr": lambda: _sgd(0.9, lr=torch.tensor(0.1), reset=False),
}
EACH_CALL = pytest.mark.parametrize("name", CALLS)
EACH_MUTATION = pytest.mark.parametrize("name", [n for n in CALLS if n != "stats"])


def written_and_read(call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a call that its schema says are written, and the others."""
    op, args, kwargs = call
    written: list[Tensor] = []
    read: list[Tensor] = []
    for position, argument in enumerate(op._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (written if is_written else read).extend(t for t in tensors if isinstance(t, Tensor))
    return written, read


@EACH_CALL
def test_opcheck(name: str) -> None:
    op, args, kwargs = CALLS[name]()
    assert opcheck(op, args, kwargs) == dict.fromkeys(CHECKS, "SUCCESS")


def test_opcheck_of_differentiable_stats() -> None:
    grads = [t.requires_grad_() for t in _pair()]
    assert opcheck(OPS.grad_stats.default, (grads,)) == dict.fromkeys(CHECKS, "SUCCESS")


@EACH_MUTATION
@pytest.mark.parametrize("grad_mode", [True, False])
def test_version_counters_move(name: str, grad_mode: bool) -> None:
    call = CALLS[name]()
    written, read = written_and_read(call)
    before = [t._version for t in written], [t._version for t in read]
    with torch.set_grad_enabled(grad_mode):
        call[0](*call[1], **call[2])
    assert all(t._version > old for t, old in zip(written, before[0], strict=True))
    assert [t._version for t in read] == before[1]


def test_a_backward_through_what_was_overwritten_raises() -> None:
    weight = nonzero(5).requires_grad_()
    factor = nonzero(5)
    product = weight * factor
    OPS.grad_accumulate_([factor], [torch.ones(5)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_views_share_their_versions() -> None:
    base = nonzero(10)
    before = base._version
    OPS.grad_accumulate_([base[2:7]], [torch.ones(5)])
    assert base._version > before


@EACH_MUTATION
def test_inference_mode(name: str) -> None:
    """Tensors made in inference mode have no versions; those made outside keep theirs true."""
    with torch.inference_mode():
        op, args, kwargs = CALLS[name]()
        op(*args, **kwargs)
    call = CALLS[name]()
    written, _ = written_and_read(call)
    before = [t._version for t in written]
    with torch.inference_mode():
        call[0](*call[1], **call[2])
    assert all(t._version > old for t, old in zip(written, before, strict=True))


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [_to_meta(v) for v in value] if isinstance(value, list) else value


@EACH_CALL
def test_meta(name: str) -> None:
    op, args, kwargs = CALLS[name]()
    result = op(*map(_to_meta, args), **{k: _to_meta(v) for k, v in kwargs.items()})
    if name != "stats":
        assert result is None
        return
    for mine, real in zip(result, op(*args, **kwargs), strict=True):
        assert mine.is_meta
        assert (mine.dtype, mine.shape, mine.stride()) == (real.dtype, real.shape, real.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_meta_dtypes_of_stats(dtype: torch.dtype) -> None:
    norm, norms, found_inf = OPS.grad_stats([torch.empty(3, dtype=dtype, device="meta")])
    assert norm.dtype is norms.dtype is OPS.grad_stats([torch.ones(3, dtype=dtype)])[0].dtype
    assert found_inf.dtype is torch.float32


def test_meta_refuses_what_cpu_refuses() -> None:
    good, bad = torch.empty(3, device="meta"), torch.empty(4, device="meta")
    with pytest.raises(RuntimeError, match=r"grads\[0\] takes the sizes of accumulators\[0\]"):
        OPS.grad_accumulate_([good], [bad])
    with pytest.raises(RuntimeError, match="lr takes a number >= 0"):
        OPS.sgd_step_([good], [good], [], [], lr=-1.0)


@EACH_MUTATION
def test_autocast_changes_nothing(name: str) -> None:
    torch.manual_seed(1)
    plain = CALLS[name]()
    plain[0](*plain[1], **plain[2])
    torch.manual_seed(1)
    cast = CALLS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast[0](*cast[1], **cast[2])
        norm, _, _ = OPS.grad_stats([torch.full((4,), 1 + 2**-12)])
    assert norm == 2 * (1 + 2**-12)
    for mine, other in zip(written_and_read(cast)[0], written_and_read(plain)[0], strict=True):
        assert torch.equal(mine, other)


def _batched(value: Any, samples: int) -> Any:
    if isinstance(value, Tensor):
        return torch.stack([value + i for i in range(samples)])
    return [_batched(v, samples) for v in value] if isinstance(value, list) else value


@EACH_MUTATION
@pytest.mark.parametrize("in_dim", [0, -1])
def test_vmap_steps_each_sample(name: str, in_dim: int) -> None:
    op, args, kwargs = CALLS[name]()
    if name.startswith("embedding"):
        batched = [_batched(args[0], 3), torch.stack([args[1]] * 3), _batched(args[2], 3)]
    else:
        batched = [_batched(a, 3) for a in args]
    mapped = [a for a in batched if a is not None]

    def moved(value: Any) -> Any:
        return [moved(v) for v in value] if isinstance(value, list) else value.movedim(0, in_dim)

    mine = [moved(a) for a in mapped]

    def call(*given: Any) -> Tensor:
        rest = iter(given)
        op(*(None if a is None else next(rest) for a in args), **kwargs)
        return torch.zeros(())

    expected = []
    for i in range(3):
        sample = torch.utils._pytree.tree_map(lambda t, i=i: t[i].clone(), mapped)
        call(*sample)
        expected.append(sample)
    torch.vmap(call, in_dims=in_dim)(*mine)
    for i in range(3):
        for now, wanted in zip(
            torch.utils._pytree.tree_leaves(mine),
            torch.utils._pytree.tree_leaves(expected[i]),
            strict=True,
        ):
            assert torch.equal(now.movedim(in_dim, 0)[i], wanted)


def test_vmap_of_stats() -> None:
    one, other = nonzero(3, 4, 5), nonzero(6)
    norm, norms, found_inf = torch.vmap(lambda x: OPS.grad_stats([x, other]), in_dims=1)(one)
    for i in range(4):
        wanted = OPS.grad_stats([one[:, i], other])
        assert torch.equal(norm[i], wanted[0])
        assert torch.equal(norms[i], wanted[1])
        assert torch.equal(found_inf[i], wanted[2])
    nested = torch.vmap(torch.vmap(lambda x: OPS.grad_stats([x])[0]))(one)
    torch.testing.assert_close(nested, one.norm(dim=-1))
    none = torch.vmap(lambda x: OPS.grad_stats([x]))(torch.empty(0, 3))
    assert [tuple(t.shape) for t in none] == [(0,), (0, 1), (0,)]


def test_vmap_refuses_what_samples_would_share() -> None:
    shared = torch.zeros(4)
    message = "accumulators takes tensors that torch.vmap maps"
    with pytest.raises(RuntimeError, match=f"grad_accumulate_: {message}"):
        torch.vmap(lambda g: OPS.grad_accumulate_([shared], [g]))(torch.ones(3, 4))
    assert not shared.any()
    mapped = torch.zeros(3, 4)
    torch.vmap(lambda a: (OPS.grad_accumulate_([a], [torch.ones(4)]), a)[1])(mapped)
    assert torch.equal(mapped, torch.ones(3, 4))


def test_functorch_gradients_of_stats() -> None:
    grads = [nonzero(3, 4), nonzero(5)]

    def norm(*g: Tensor) -> Tensor:
        total, each, _ = OPS.grad_stats(list(g))
        return total * each.sum()

    def plain(*g: Tensor) -> Tensor:
        each = torch.stack([x.norm() for x in g])
        return each.norm() * each.sum()

    argnums = (0, 1)
    for transform in (torch.func.grad, torch.func.jacrev):
        for mine, wanted in zip(
            transform(norm, argnums)(*grads), transform(plain, argnums)(*grads), strict=True
        ):
            assert_same_but_for_rounding(mine, wanted)
    second = torch.func.grad(lambda x: torch.func.grad(norm)(x, grads[1]).square().sum())(grads[0])
    wanted = torch.func.grad(lambda x: torch.func.grad(plain)(x, grads[1]).square().sum())(grads[0])
    assert_same_but_for_rounding(second, wanted)
    batch = nonzero(7, 5)
    per_sample = torch.vmap(torch.func.grad(lambda x: OPS.grad_stats([x])[0]))(batch)
    torch.testing.assert_close(per_sample, batch / batch.norm(dim=1, keepdim=True))


def test_in_place_inside_a_transform_that_does_not_differentiate_it() -> None:
    def loss(x: Tensor) -> Tensor:
        total = torch.zeros(4)
        OPS.grad_accumulate_([total], [x.detach()])
        return (x * total).sum()

    x = nonzero(4)
    assert_same_but_for_rounding(torch.func.grad(loss)(x), x)
    with pytest.raises(RuntimeError, match="the operator is not differentiable"):
        torch.func.grad(lambda x: (OPS.grad_accumulate_([torch.zeros(4)], [x]), x.sum())[1])(x)


@EACH_CALL
def test_forward_mode_raises(name: str) -> None:
    op, args, kwargs = CALLS[name]()
    with fwAD.dual_level():

        def dual(value: Any) -> Any:
            if isinstance(value, list):
                return [dual(v) for v in value]
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return fwAD.make_dual(value, torch.ones_like(value)) if floating else value

        with pytest.raises(
            NotImplementedError, match="forward-mode automatic differentiation is not supported"
        ):
            op(*map(dual, args), **kwargs)


def test_many_threads_at_once() -> None:
    """Each thread its own list; the sums are exact."""
    accumulators = [[torch.zeros(1000) for _ in range(20)] for _ in range(6)]
    grads = [torch.ones(1000, dtype=torch.bfloat16) for _ in range(20)]
    errors: list[BaseException] = []

    def work(mine: list[Tensor]) -> None:
        try:
            for _ in range(50):
                OPS.grad_accumulate_(mine, grads)
                assert OPS.grad_stats(mine)[2] == 0
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in accumulators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(t, torch.full((1000,), 50.0)) for mine in accumulators for t in mine)


def test_gradients_of_a_model_in_place() -> None:
    """Straight into .grad, as an optimizer's accumulator."""
    model = torch.nn.Linear(4, 3)
    model(torch.randn(2, 4)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before = [g.clone() for g in grads]
    OPS.grad_accumulate_(grads, [g.bfloat16() for g in before])
    for grad, old in zip(grads, before, strict=True):
        assert_same_but_for_rounding(grad, old + old.bfloat16())
