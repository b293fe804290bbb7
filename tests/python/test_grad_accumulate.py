"""grad_accumulate_: accumulators = beta * accumulators + scale * grads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accumulation_cases import (
    DTYPE_PAIRS,
    DTYPES,
    OPS,
    assert_one_rounding,
    dtype_id,
    layouts,
    nonzero,
    read_layouts,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("device")


def exact(accumulator: Tensor, grad: Tensor, beta: float, scale: float) -> Tensor:
    addend = scale * grad.double()
    return addend if beta == 0 else beta * accumulator.double() + addend


def check(
    accumulators: list[Tensor], grads: list[Tensor], beta: float = 1.0, scale: Tensor | None = None
) -> None:
    factor = 1.0 if scale is None else scale.item()
    expected = [exact(a, g, beta, factor) for a, g in zip(accumulators, grads, strict=True)]
    before = [g.clone() for g in grads]
    pointers = [a.data_ptr() for a in accumulators]
    assert OPS.grad_accumulate_(accumulators, grads, beta=beta, scale=scale) is None
    assert [a.data_ptr() for a in accumulators] == pointers
    for accumulator, wanted in zip(accumulators, expected, strict=True):
        assert_one_rounding(accumulator, wanted, terms=2)
    for grad, old in zip(grads, before, strict=True):
        assert torch.equal(grad, old)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_sizes_around_every_vector_width(
    dtypes: tuple[torch.dtype, torch.dtype], cpu_capability: str
) -> None:
    accumulators = [nonzero(n, dtype=dtypes[0]) for n in range(71)]
    grads = [nonzero(n, dtype=dtypes[1]) for n in range(71)]
    check(accumulators, grads)
    check(accumulators, grads, beta=0.0)
    check(accumulators, grads, beta=0.5, scale=torch.tensor(0.75))
    for accumulator, grad in zip(accumulators, grads, strict=True):
        check([accumulator], [grad])


def test_every_dtype_in_one_list(cpu_capability: str) -> None:
    shapes = [(3, 5), (), (1,), (0, 4), (7, 1, 9), (257,)]
    accumulators = [nonzero(*s, dtype=a) for a, _ in DTYPE_PAIRS for s in shapes]
    grads = [nonzero(*s, dtype=g) for _, g in DTYPE_PAIRS for s in shapes]
    check(accumulators, grads)
    check(accumulators, grads, beta=-0.5, scale=torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_strides(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for rows, cols in ((1, 1), (2, 3), (17, 33), (40, 130)):
        for beta in (1.0, 0.0):
            for name, grad in read_layouts(rows, cols, dtypes[1]).items():
                targets = layouts(rows, cols, dtypes[0])
                check(list(targets.values()), [grad] * len(targets), beta)
                assert name


def test_strides_of_more_dimensions() -> None:
    for permutation in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0), (0, 3, 2, 1)):
        accumulator = nonzero(4, 5, 6, 7).permute(permutation)
        grad = nonzero(*accumulator.shape, dtype=torch.bfloat16)
        check([accumulator], [grad])
        back = [permutation.index(i) for i in range(4)]
        check([grad.permute(back)], [accumulator.permute(back).flip(0)], beta=0.5)
    image = nonzero(2, 8, 5, 5).to(memory_format=torch.channels_last)
    check([image], [nonzero(2, 8, 5, 5)])
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_what_lies_between_stays() -> None:
    storage = nonzero(20, 30)
    before = storage.clone()
    view = storage[3:9:2, 5:25:3]
    OPS.grad_accumulate_([view], [nonzero(*view.shape)])
    view.copy_(before[3:9:2, 5:25:3])
    assert torch.equal(storage, before)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_beta_of_zero_never_reads(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for bad in (float("nan"), float("inf")):
        for n in (1, 40, 5000):
            accumulators = [torch.full((n,), bad, dtype=dtypes[0]) for _ in range(2)]
            accumulators.append(torch.full((n, 2), bad, dtype=dtypes[0]).t())
            grads = [nonzero(*a.shape, dtype=dtypes[1]) for a in accumulators]
            OPS.grad_accumulate_(accumulators, grads, beta=0.0)
            for accumulator, grad in zip(accumulators, grads, strict=True):
                assert torch.equal(accumulator, grad.to(dtypes[0]))


def test_what_is_not_finite_arrives() -> None:
    accumulator = torch.zeros(50)
    grad = torch.zeros(50, dtype=torch.bfloat16)
    grad[3], grad[40] = float("nan"), float("-inf")
    OPS.grad_accumulate_([accumulator], [grad])
    assert accumulator[3].isnan()
    assert accumulator[40] == float("-inf")
    assert accumulator.isfinite().sum() == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_256_plus_1_minus_256(dtype: torch.dtype, cpu_capability: str) -> None:
    for n in range(1, 71):
        accumulator = torch.empty(n)
        for beta, value in ((0.0, 256.0), (1.0, 1.0), (1.0, -256.0)):
            OPS.grad_accumulate_([accumulator], [torch.full((n,), value, dtype=dtype)], beta=beta)
        assert torch.equal(accumulator, torch.ones(n))
    assert (torch.tensor(256.0, dtype=torch.bfloat16) + 1) - 256 == 0  # what this avoids


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scale_of_every_dtype_and_shape(dtype: torch.dtype) -> None:
    for scale in (
        torch.tensor(0.375, dtype=dtype),
        torch.tensor([-2.0], dtype=dtype),
        torch.tensor([[[0.0]]], dtype=dtype),
    ):
        check([nonzero(33)], [nonzero(33, dtype=torch.bfloat16)], scale=scale)


def test_the_same_gradient_for_several_accumulators() -> None:
    grad = nonzero(70)
    check([nonzero(70) for _ in range(3)], [grad, grad, grad])


def test_an_accumulator_as_its_own_gradient() -> None:
    accumulator = nonzero(70)
    doubled = accumulator + accumulator
    OPS.grad_accumulate_([accumulator], [accumulator])
    assert torch.equal(accumulator, doubled)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # torch.frombuffer's memory
def test_unaligned_memory() -> None:
    raw = bytearray(4 * 70 + 8)
    for offset in range(1, 8):
        accumulator = torch.frombuffer(raw, dtype=torch.float32, count=70, offset=offset)
        accumulator.copy_(nonzero(70))
        check([accumulator], [nonzero(70)])


def test_every_thread_count_gives_the_same_bits(set_num_threads: Callable[[int], None]) -> None:
    shapes = [(64,)] * 300 + [(300, 700), (1,), (100_003,), (0,)]
    accumulators = [nonzero(*s) for s in shapes] + [nonzero(400, 300).t()]
    grads = [nonzero(*a.shape, dtype=torch.bfloat16) for a in accumulators]
    results = []
    for threads in (1, 2, 3, 4, 7):
        set_num_threads(threads)
        mine = [a.clone() for a in accumulators]
        OPS.grad_accumulate_(mine, grads, beta=0.3, scale=torch.tensor(1.7))
        results.append(mine)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_lists_and_tensors() -> None:
    assert OPS.grad_accumulate_([], []) is None
    check([torch.empty(0), torch.empty(3, 0)], [torch.empty(0), torch.empty(3, 0).double()])
    check([torch.empty(0), nonzero(3)], [torch.empty(0), nonzero(3)])
    check([torch.empty(4, 0).t()], [torch.empty(0, 4)], beta=0.0)


def test_agrees_with_torch_over_many_micro_batches() -> None:
    """fp32 into fp32 rounds as add_ does."""
    shapes = [(3, 5), (100,), (17, 33)]
    accumulators = [torch.empty(s) for s in shapes]
    expected = [torch.zeros(s) for s in shapes]
    for step in range(10):
        grads = [torch.randn(s) for s in shapes]
        OPS.grad_accumulate_(accumulators, grads, beta=float(step > 0))
        torch._foreach_add_(expected, grads)
    for accumulator, wanted in zip(accumulators, expected, strict=True):
        assert torch.equal(accumulator, wanted)
