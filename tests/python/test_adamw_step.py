"""adamw_step_ against torch.optim.AdamW and Adam."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_cases import DTYPE_TRIPLES, DTYPES, dtype_id, layouts, nonzero
from optimizer_step_cases import FusedAdam, assert_near, leaves, random_tensors, torch_step

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = [
    {"weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    for weight_decay, amsgrad, maximize in itertools.product(
        (0.0, 0.1), (False, True), (False, True)
    )
]


def _id(options: object) -> str:
    return "-".join(f"{k}_{v}" for k, v in options.items()) if isinstance(options, dict) else ""


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("options", OPTIONS, ids=_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_all_options_against_torch_in_float64(
    dtype: torch.dtype, options: dict[str, Any], decoupled: bool, cpu_capability: str
) -> None:
    start = random_tensors(dtype)
    ours = FusedAdam([t.clone() for t in start], amsgrad=options["amsgrad"])
    theirs = leaves(start, torch.float64)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = optimizer(theirs, lr=0.03, betas=(0.85, 0.98), eps=1e-6, foreach=False, **options)
    ours_options = {k: v for k, v in options.items() if k != "amsgrad"}
    for step in range(4):
        grads = random_tensors(dtype)
        torch_step(reference, theirs, grads)
        ours.step(
            grads, lr=0.03, beta1=0.85, beta2=0.98, eps=1e-6, decoupled=decoupled, **ours_options
        )
        eps = 4 * torch.finfo(dtype).eps
        assert_near(ours.params, theirs, eps)
        state = [reference.state[p] for p in theirs]
        assert_near(ours.exp_avgs, [s["exp_avg"] for s in state], eps)
        assert_near(ours.exp_avg_sqs, [s["exp_avg_sq"] for s in state], eps)
        if options["amsgrad"]:
            assert_near(ours.max_exp_avg_sqs, [s["max_exp_avg_sq"] for s in state], eps)
        assert all(count == step + 1 for count in ours.steps)
        assert all(not accumulator.any() for accumulator in ours.accumulators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_as_accurate_as_torchs_fused_step(dtype: torch.dtype) -> None:
    """From one state, a step each: the distance to float64 is not larger than torch's own."""
    start = [nonzero(4000, dtype=dtype)]
    ours, theirs, exact = FusedAdam([start[0].clone()]), leaves(start), leaves(start, torch.float64)
    reference = torch.optim.AdamW(theirs, lr=0.01, fused=True)
    in_double = torch.optim.AdamW(exact, lr=0.01, foreach=False)
    grads = [nonzero(4000, dtype=dtype)]
    torch_step(reference, theirs, grads)
    torch_step(in_double, exact, grads)
    ours.step(grads, lr=0.01, weight_decay=0.01)
    error = (ours.params[0].double() - exact[0]).norm()
    torchs_error = (theirs[0].double() - exact[0]).norm()
    assert error <= 1.1 * torchs_error


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=_id)
def test_state_of_torchs_optimizer_goes_on(
    optimizer: type[torch.optim.Optimizer], flags: dict[str, bool]
) -> None:
    """Three steps by torch, then one of ours on the same state tensors, or torch's fourth."""
    params = leaves(random_tensors())
    reference = optimizer(params, lr=0.02, weight_decay=0.1, **flags)
    for _ in range(3):
        torch_step(reference, params, random_tensors())
    ours = FusedAdam([p.detach().clone() for p in params])
    state = [reference.state[p] for p in params]
    ours.exp_avgs = [s["exp_avg"].clone() for s in state]
    ours.exp_avg_sqs = [s["exp_avg_sq"].clone() for s in state]
    ours.steps = [s["step"].clone() for s in state]
    grads = random_tensors()
    torch_step(reference, params, grads)
    ours.step(grads, lr=0.02, weight_decay=0.1, decoupled=optimizer is torch.optim.AdamW)
    assert_near(ours.params, params, 2e-7)
    assert_near(ours.exp_avgs, [reference.state[p]["exp_avg"] for p in params], 2e-7)
    assert all(count == 4 for count in ours.steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_tensor_lr(dtype: torch.dtype) -> None:
    for lr in (torch.tensor(0.125, dtype=dtype), torch.tensor([0.125], dtype=dtype)):
        start, grads = random_tensors(), random_tensors()
        by_tensor, by_number = (FusedAdam([t.clone() for t in start]) for _ in range(2))
        by_tensor.step([g.clone() for g in grads], lr=lr, weight_decay=0.1)
        by_number.step(grads, lr=0.125, weight_decay=0.1)
        for mine, other in zip(by_tensor.tensors(), by_number.tensors(), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_master_weights_train_in_float(dtype: torch.dtype) -> None:
    """Steps too small for the parameter's dtype add up in its master."""
    start = random_tensors(dtype)
    ours = FusedAdam(
        [t.clone() for t in start], state_dtype=torch.float32, master_dtype=torch.float32
    )
    plain = FusedAdam([t.float() for t in start])
    for _ in range(5):
        grads = random_tensors()
        ours.step([g.clone() for g in grads], lr=1e-4)
        plain.step(grads, lr=1e-4)
    for param, master, expected in zip(ours.params, ours.masters, plain.params, strict=True):
        assert torch.equal(master, expected)
        assert torch.equal(param, master.to(dtype))


def test_masters_of_some_parameters_only() -> None:
    start = [nonzero(40, dtype=torch.bfloat16), nonzero(33)]
    ours = FusedAdam([t.clone() for t in start], state_dtype=torch.float32)
    ours.masters = [start[0].float(), torch.empty(0)]
    plain = FusedAdam([t.float() for t in start])
    grads = [nonzero(40), nonzero(33)]
    ours.step([g.clone() for g in grads])
    plain.step(grads)
    assert torch.equal(ours.params[0], plain.params[0].bfloat16())
    assert torch.equal(ours.params[1], plain.params[1])


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES, ids=dtype_id)
def test_every_mix_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    param_dtype, grad_dtype, state_dtype = dtypes
    params, grads = [nonzero(70, dtype=param_dtype)], [nonzero(70, dtype=grad_dtype)]
    ours = FusedAdam([p.clone() for p in params], state_dtype=state_dtype)
    theirs = leaves(params, torch.float64)
    torch_step(torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0), theirs, grads)
    ours.step(grads, lr=0.1)
    assert_near(ours.params, theirs, max(torch.finfo(param_dtype).eps, 1e-6))
    assert not grads[0].any()


def test_coefficient_scales_the_gradient() -> None:
    """Normalise, unscale and clip as one factor."""
    start, grads = random_tensors(), random_tensors()
    for coefficient in (torch.tensor(0.25), torch.tensor([2.0], dtype=torch.float64)):
        ours, plain = (FusedAdam([t.clone() for t in start]) for _ in range(2))
        ours.step([g.clone() for g in grads], coefficient=coefficient)
        plain.step([g * coefficient.item() for g in grads])
        assert_near(ours.tensors(), plain.tensors(), 2e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_found_inf_skips_everything_but_the_reset(bad: float) -> None:
    ours = FusedAdam(random_tensors(), amsgrad=True, master_dtype=torch.float32)
    ours.step(random_tensors())
    before = [t.clone() for t in ours.tensors()]
    grads = random_tensors()
    grads[3][7] = bad
    _, _, found_inf = torch.ops.torch_ext.grad_stats(grads)
    ours.step(grads, found_inf=found_inf)
    for now, old in zip(ours.tensors(), before, strict=True):
        assert torch.equal(now, old)
    assert all(not accumulator.any() for accumulator in ours.accumulators)
    grads = random_tensors()
    kept = [g.clone() for g in grads]
    ours.step(grads, found_inf=torch.ones(1), reset=False)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    ours.step(grads, found_inf=torch.zeros(()))  # and it recovers
    assert all(count == 2 for count in ours.steps)


def test_without_reset_the_accumulators_stay() -> None:
    start, grads = random_tensors(), random_tensors()
    kept = [g.clone() for g in grads]
    FusedAdam(start).step(grads, reset=False)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_strides() -> None:
    dense = FusedAdam([nonzero(17, 33)], amsgrad=True)
    grad = nonzero(17, 33)
    for name, storage in layouts(17, 33, torch.float32).items():
        ours = FusedAdam([storage.copy_(dense.params[0])], amsgrad=True)
        ours.exp_avgs = [torch.zeros(33, 17).t()]
        ours.step([grad.t().contiguous().t()])
        expected = FusedAdam([dense.params[0].clone()], amsgrad=True)
        expected.step([grad.clone()])
        for mine, theirs in zip(ours.tensors(), expected.tensors(), strict=True):
            assert torch.equal(mine, theirs), name


def test_counters_of_parameters_may_differ() -> None:
    """A parameter that joined later has its own bias corrections."""
    start = [nonzero(40), nonzero(40)]
    both = FusedAdam([t.clone() for t in start])
    both.steps[1].fill_(9)
    alone = [FusedAdam([t.clone()]) for t in start]
    alone[1].steps[0].fill_(9)
    grads = [nonzero(40), nonzero(40)]
    for ours, grad in zip(alone, grads, strict=True):
        ours.step([grad.clone()])
    both.step(grads)
    for i in range(2):
        assert torch.equal(both.params[i], alone[i].params[0])


def test_step_counters_in_float64() -> None:
    ours = FusedAdam([nonzero(5)])
    ours.steps = [torch.tensor([2.0**24], dtype=torch.float64)]
    ours.step([nonzero(5)])
    assert ours.steps[0].item() == 2.0**24 + 1


def test_every_thread_count_gives_the_same_bits(set_num_threads: Callable[[int], None]) -> None:
    start = [nonzero(64) for _ in range(200)] + [nonzero(300, 700), nonzero(100_003)]
    grads = [nonzero(*t.shape) for t in start]
    results = []
    for threads in (1, 2, 3, 4, 7):
        set_num_threads(threads)
        ours = FusedAdam([t.clone() for t in start])
        ours.step([g.clone() for g in grads])
        results.append(ours.tensors())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_lists() -> None:
    FusedAdam([]).step([])
    FusedAdam([]).step([], lr=torch.tensor(0.1))
    ours = FusedAdam([torch.empty(0)])
    ours.step([torch.empty(0)])
    assert ours.steps[0] == 1
