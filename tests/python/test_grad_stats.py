"""grad_stats: norms of a list of gradients and whether they are finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accumulation_cases import DTYPES, OPS, dtype_id, nonzero, read_layouts
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("device")


def check(grads: list[Tensor]) -> None:
    norm, norms, found_inf = OPS.grad_stats(grads)
    wanted_dtype = torch.float64 if any(g.dtype is torch.float64 for g in grads) else torch.float32
    assert norm.dtype is norms.dtype is wanted_dtype
    assert found_inf.dtype is torch.float32
    assert norm.shape == found_inf.shape == ()
    assert norms.shape == (len(grads),)
    expected = torch.stack([torch.linalg.vector_norm(g.double()) for g in grads])
    rtol = 1e-12 if wanted_dtype is torch.float64 else torch.finfo(torch.float32).eps
    torch.testing.assert_close(norms.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(norm.double(), torch.linalg.vector_norm(expected), rtol=rtol, atol=0)
    assert found_inf == float(not all(g.isfinite().all() for g in grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sizes_around_every_vector_width(dtype: torch.dtype, cpu_capability: str) -> None:
    grads = [nonzero(n, dtype=dtype) for n in range(71)]
    check(grads)
    for grad in grads:
        check([grad])


def test_every_dtype_in_one_list() -> None:
    check([nonzero(n, dtype=d) for d in DTYPES for n in (1, 40, 10_000, 100_003)])
    check([nonzero(n, dtype=d) for d in DTYPES[2:] for n in (1, 40, 10_000)])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strides(dtype: torch.dtype) -> None:
    for rows, cols in ((1, 1), (17, 33), (40, 130)):
        check(list(read_layouts(rows, cols, dtype).values()))
    check([nonzero(4, 5, 6, 7, dtype=dtype).permute(2, 0, 3, 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_element(dtype: torch.dtype, bad: float, cpu_capability: str) -> None:
    for n in (1, 33, 9000):
        grads = [nonzero(5), nonzero(n, dtype=dtype), nonzero(0)]
        grads[1][n // 2] = bad
        norm, norms, found_inf = OPS.grad_stats(grads)
        assert found_inf == 1
        assert not norm.isfinite()
        assert norms.isfinite().tolist() == [True, False, True]


def test_squares_that_overflow_their_dtype() -> None:
    check([torch.full((100,), 3e4, dtype=torch.float16)])
    check([torch.full((100,), 1e37), torch.full((3,), 1e-30)])
    large = torch.full((100,), 1e200, dtype=torch.float64)  # torch.linalg.vector_norm gives inf
    norm, norms, found_inf = OPS.grad_stats([large, nonzero(5).double()])
    torch.testing.assert_close(norm.item(), 1e201, rtol=1e-12, atol=0)
    assert norms.isfinite().all()
    assert found_inf == 0
    norm, _, found_inf = OPS.grad_stats([torch.full((100,), 3e38)])
    assert norm == float("inf")  # beyond fp32, but no element is
    assert found_inf == 0


def test_large_list_does_not_lose_small_tensors() -> None:
    grads = [torch.full((1,), 1e6), *(torch.ones(1) for _ in range(2000))]
    norm = OPS.grad_stats(grads)[0]
    assert norm == torch.tensor(1e12 + 2000, dtype=torch.float64).sqrt().float()


def test_every_thread_count_gives_the_same_bits(set_num_threads: Callable[[int], None]) -> None:
    grads = [nonzero(64) for _ in range(300)] + [nonzero(300, 700), nonzero(400, 300).t()]
    grads += [nonzero(100_003, dtype=d) for d in DTYPES[1:]]
    results = []
    for threads in (1, 2, 3, 4, 7):
        set_num_threads(threads)
        results.append(OPS.grad_stats(grads))
    for norm, norms, _ in results[1:]:
        assert torch.equal(norm, results[0][0])
        assert torch.equal(norms, results[0][1])


def test_the_norm_does_not_depend_on_the_grouping_of_one_tensor() -> None:
    """Each tensor's norm is its own, whatever else is in the list."""
    grads = [nonzero(n) for n in (7, 10_000, 64)]
    together = OPS.grad_stats(grads)[1]
    alone = torch.stack([OPS.grad_stats([g])[0] for g in grads])
    assert torch.equal(together, alone)


def test_empty_lists_and_tensors() -> None:
    norm, norms, found_inf = OPS.grad_stats([])
    assert norm == 0
    assert norms.shape == (0,)
    assert found_inf == 0
    norm, norms, found_inf = OPS.grad_stats([torch.empty(0), torch.empty(3, 0)])
    assert norm == 0
    assert torch.equal(norms, torch.zeros(2))
    assert found_inf == 0


def test_gradient_of_the_norms() -> None:
    def leaves() -> list[Tensor]:
        torch.manual_seed(3)
        return [nonzero(*s).double().requires_grad_() for s in ((3, 4), (5,), ())]

    assert gradcheck(lambda *g: OPS.grad_stats(g)[0], leaves())
    assert gradcheck(lambda *g: OPS.grad_stats(g)[1], leaves())
    assert gradcheck(lambda *g: OPS.grad_stats(g)[0] * OPS.grad_stats(g)[1].prod(), leaves())
    assert gradgradcheck(lambda *g: OPS.grad_stats(g)[0], leaves())
    assert gradgradcheck(lambda *g: OPS.grad_stats(g)[1].square().sum(), leaves())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    grads = [nonzero(6, 4, dtype=dtype).t().requires_grad_(), nonzero(dtype=dtype).requires_grad_()]
    norm, norms, found_inf = OPS.grad_stats(grads)
    assert not found_inf.requires_grad
    (2 * norm + norms[0]).backward()
    total = torch.linalg.vector_norm(torch.stack([g.detach().double().norm() for g in grads]))
    own = grads[0].detach().double().norm()
    for grad, factor in ((grads[0], 2 / total + 1 / own), (grads[1], 2 / total)):
        assert grad.grad is not None
        assert grad.grad.dtype is dtype
        eps = torch.finfo(dtype).eps if dtype is not torch.float64 else 1e-14
        torch.testing.assert_close(
            grad.grad.double(), grad.detach().double() * factor, rtol=4 * eps, atol=0
        )


def test_gradient_at_zero_is_zero() -> None:
    grads = [torch.zeros(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    norm, norms, _ = OPS.grad_stats(grads)
    (first, _) = torch.autograd.grad(norm + norms.sum(), grads)
    assert torch.equal(first, torch.zeros(3))
    zero = torch.zeros(4, requires_grad=True)
    (first,) = torch.autograd.grad(OPS.grad_stats([zero])[0], zero, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zero)
    assert torch.equal(first, torch.zeros(4))
    assert second.isfinite().all()


def test_only_those_that_require_grad_get_one() -> None:
    wanted, other = nonzero(3).requires_grad_(), nonzero(4)
    norm, _, _ = OPS.grad_stats([other, wanted])
    norm.backward()
    torch.testing.assert_close(wanted.grad, wanted.detach() / norm.detach())
    with torch.no_grad():
        assert not OPS.grad_stats([wanted])[0].requires_grad


def test_a_changed_gradient_raises_in_backward() -> None:
    grad = nonzero(5).requires_grad_()
    scaled = grad * 2
    norm = OPS.grad_stats([scaled])[0]
    scaled.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norm.backward()
