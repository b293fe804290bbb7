"""sgd_step_ against torch.optim.SGD."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_cases import DTYPE_PAIRS, DTYPES, dtype_id, layouts, nonzero
from optimizer_step_cases import FusedSgd, assert_near, leaves, random_tensors, torch_step

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.4), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


def _id(options: object) -> str:
    return "-".join(f"{k}_{v}" for k, v in options.items()) if isinstance(options, dict) else ""


@pytest.mark.parametrize("options", OPTIONS, ids=_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_all_options_against_torch_in_float64(
    dtype: torch.dtype, options: dict[str, Any], cpu_capability: str
) -> None:
    start = random_tensors(dtype)
    ours = FusedSgd([t.clone() for t in start], momentum=options["momentum"])
    theirs = leaves(start, torch.float64)
    reference = torch.optim.SGD(theirs, lr=0.05, foreach=False, **options)
    ours_options = {k: v for k, v in options.items() if k != "momentum"}
    eps = 4 * torch.finfo(dtype).eps
    for _ in range(4):
        grads = random_tensors(dtype)
        torch_step(reference, theirs, grads)
        ours.step(grads, lr=0.05, **ours_options)
        assert_near(ours.params, theirs, eps)
        if options["momentum"]:
            buffers = [reference.state[p]["momentum_buffer"] for p in theirs]
            assert_near(ours.buffers, buffers, eps)
        assert all(not accumulator.any() for accumulator in ours.accumulators)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=_id)
def test_state_of_torchs_optimizer_goes_on(flags: dict[str, bool]) -> None:
    params = leaves(random_tensors())
    reference = torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.1, **flags)
    for _ in range(3):
        torch_step(reference, params, random_tensors())
    ours = FusedSgd([p.detach().clone() for p in params], momentum=0.9)
    ours.buffers = [reference.state[p]["momentum_buffer"].clone() for p in params]
    ours.is_first = False
    grads = random_tensors()
    torch_step(reference, params, grads)
    ours.step(grads, lr=0.02, weight_decay=0.1)
    assert_near(ours.params, params, 2e-7)
    assert_near(ours.buffers, [reference.state[p]["momentum_buffer"] for p in params], 2e-7)


def test_first_steps_of_some_parameters_only() -> None:
    """A parameter that joined later starts its buffer without dampening."""
    start, grads = [nonzero(40), nonzero(40)], [nonzero(40), nonzero(40)]
    ours = FusedSgd([t.clone() for t in start], momentum=0.9)
    ours.buffers[1] = nonzero(40)
    expected = [grads[0].clone(), 0.9 * ours.buffers[1] + 0.7 * grads[1]]
    torch.ops.torch_ext.sgd_step_(
        ours.params,
        grads,
        ours.buffers,
        [],
        lr=0.1,
        momentum=0.9,
        dampening=0.3,
        first_step=[True, False],
    )
    assert_near(ours.buffers, expected, 2e-7)
    assert_near(ours.params, [p - 0.1 * b for p, b in zip(start, expected, strict=True)], 2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_tensor_lr(dtype: torch.dtype) -> None:
    start, grads = random_tensors(), random_tensors()
    by_tensor, by_number = (FusedSgd([t.clone() for t in start], momentum=0.5) for _ in range(2))
    by_tensor.step([g.clone() for g in grads], lr=torch.tensor(0.125, dtype=dtype))
    by_number.step(grads, lr=0.125)
    for mine, other in zip(by_tensor.tensors(), by_number.tensors(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_master_weights_train_in_float(dtype: torch.dtype) -> None:
    start = random_tensors(dtype)
    ours = FusedSgd([t.clone() for t in start], master_dtype=torch.float32)
    plain = FusedSgd([t.float() for t in start])
    for _ in range(5):
        grads = random_tensors()
        ours.step([g.clone() for g in grads], lr=1e-4)
        plain.step(grads, lr=1e-4)
    for param, master, expected in zip(ours.params, ours.masters, plain.params, strict=True):
        assert torch.equal(master, expected)
        assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_every_mix_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype], cpu_capability: str) -> None:
    """Every size, too: torch's fused SGD has skipped vectors of bf16 and fp16."""
    params = [nonzero(n, dtype=dtypes[0]) for n in range(71)]
    grads = [nonzero(n, dtype=dtypes[1]) for n in range(71)]
    for momentum in (0.0, 0.9):
        ours = FusedSgd([p.clone() for p in params], momentum=momentum)
        theirs = leaves(params, torch.float64)
        torch_step(torch.optim.SGD(theirs, lr=0.5, momentum=momentum), theirs, grads)
        ours.step([g.clone() for g in grads], lr=0.5)
        assert_near(ours.params, theirs, max(torch.finfo(dtypes[0]).eps, 1e-6))


def test_coefficient_scales_the_gradient() -> None:
    start, grads = random_tensors(), random_tensors()
    ours, plain = (FusedSgd([t.clone() for t in start], momentum=0.9) for _ in range(2))
    ours.step([g.clone() for g in grads], coefficient=torch.tensor(0.25))
    plain.step([g * 0.25 for g in grads])
    for mine, theirs in zip(ours.tensors(), plain.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_found_inf_skips_everything_but_the_reset() -> None:
    ours = FusedSgd(random_tensors(), momentum=0.9, master_dtype=torch.float32)
    ours.step(random_tensors())
    before = [t.clone() for t in ours.tensors()]
    grads = random_tensors()
    grads[0][1] = float("nan")
    ours.step(grads, found_inf=torch.ones(()))
    for now, old in zip(ours.tensors(), before, strict=True):
        assert torch.equal(now, old)
    assert all(not accumulator.any() for accumulator in ours.accumulators)


def test_without_reset_the_accumulators_stay() -> None:
    grads = random_tensors()
    kept = [g.clone() for g in grads]
    FusedSgd(random_tensors()).step(grads, reset=False)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_strides() -> None:
    start, grad = nonzero(17, 33), nonzero(17, 33)
    expected = FusedSgd([start.clone()], momentum=0.9)
    expected.step([grad.clone()])
    for name, storage in layouts(17, 33, torch.float32).items():
        ours = FusedSgd([storage.copy_(start)], momentum=0.9)
        ours.step([grad.t().contiguous().t()])
        for mine, theirs in zip(ours.tensors(), expected.tensors(), strict=True):
            assert torch.equal(mine, theirs), name


def test_every_thread_count_gives_the_same_bits(set_num_threads: Callable[[int], None]) -> None:
    start = [nonzero(64) for _ in range(200)] + [nonzero(300, 700), nonzero(100_003)]
    grads = [nonzero(*t.shape) for t in start]
    results = []
    for threads in (1, 2, 3, 4, 7):
        set_num_threads(threads)
        ours = FusedSgd([t.clone() for t in start], momentum=0.9)
        ours.step([g.clone() for g in grads])
        results.append(ours.tensors())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_lists() -> None:
    FusedSgd([]).step([])
    FusedSgd([], momentum=0.9).step([], lr=torch.tensor(0.1))
    FusedSgd([torch.empty(0)], momentum=0.9).step([torch.empty(0)])
