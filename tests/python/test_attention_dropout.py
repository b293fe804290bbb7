"""Dropout: from torch's generator, the same for every thread count, unbiased, the same backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import AttentionCase, AttentionResult, check_result
from attention_reference import attention, dropout_factor, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def sdpa(*args: object, **kwargs: object) -> Tensor:
    return torch.ops.torch_ext.scaled_dot_product_attention(*args, **kwargs)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(3)]


class _Seeds(TorchDispatchMode):
    """The seeds that attention_forward was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.torch_ext.attention_forward.default:
            self.seeds.append(kwargs["dropout_seed"].clone())
        return func(*args, **kwargs)


def test_generator_governs() -> None:
    query, key, value = _random(2, 3, 40, 16)
    torch.manual_seed(1)
    first, second = (sdpa(query, key, value, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(1)
    again = [sdpa(query, key, value, dropout_p=0.3) for _ in range(2)]
    torch.manual_seed(2)
    other = sdpa(query, key, value, dropout_p=0.3)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_generator_state_moves_on_only_with_dropout() -> None:
    query, key, value = _random(2, 3, 40, 16)
    state = torch.get_rng_state()
    sdpa(query, key, value)
    sdpa(query, key, value, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    sdpa(query, key, value, dropout_p=0.1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_same_with_and_without_autograd() -> None:
    """Recording a graph, inference mode and a dispatch mode change nothing that is drawn."""
    query, key, value = _random(2, 3, 40, 16)
    results = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode, _Seeds):
        torch.manual_seed(1)
        with context():
            results.append(sdpa(query.requires_grad_(), key, value, dropout_p=0.3).detach())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((2, 3, 37, 16), (2, 3, 70, 16)),
        AttentionCase((2, 3, 1, 16), (2, 3, 70, 16)),
        AttentionCase((37, 16), (70, 16)),
        AttentionCase((2, 6, 37, 16), (2, 2, 70, 16), enable_gqa=True),
        AttentionCase((2, 2, 3, 37, 16), (2, 1, 3, 37, 16), is_causal=True),
        AttentionCase((2, 3, 37, 16), (2, 3, 70, 16), mask=(3, 1, 70)),
        AttentionCase((2, 3, 37, 16), (2, 3, 70, 16), mask=(2, 1, 37, 70), mask_dtype=torch.bool),
        AttentionCase((1, 2, 150, 16), (1, 2, 203, 16), padding=(1, 203)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_formula_with_the_mask_written_out(
    case: AttentionCase, dropout_p: float, dtype: torch.dtype
) -> None:
    """Forward and backward use one mask: the one that attention_dropout_mask shows."""
    tensors = case.tensors(dtype)
    twins = tensors.double()
    seed = torch.tensor([123456789012345])
    options = {**case.options, "dropout_p": dropout_p}
    out, _ = torch.ops.torch_ext.attention_forward(
        *tensors.inputs, dropout_seed=seed, key_padding_mask=tensors.key_padding_mask, **options
    )
    sizes = (*out.shape[:-1], case.key[-2])
    keep = torch.ops.torch_ext.attention_dropout_mask(seed, dropout_p, sizes)
    assert keep.dtype is torch.bool
    assert keep.shape == sizes
    expected_out, _ = attention(
        *twins.inputs, keep=keep, key_padding_mask=twins.key_padding_mask, **options
    )
    grad_out = torch.randn(out.shape, dtype=dtype)
    check_result(
        AttentionResult(out, list(torch.autograd.grad(out, tensors.differentiable, grad_out))),
        AttentionResult(
            expected_out,
            list(torch.autograd.grad(expected_out, twins.differentiable, grad_out.double())),
        ),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_formula_in_half_precision(dtype: torch.dtype) -> None:
    query, key, value = (t.requires_grad_() for t in _random(2, 3, 70, 16, dtype=dtype))
    seed = torch.tensor([-5])
    out, _ = torch.ops.torch_ext.attention_forward(
        query, key, value, dropout_p=0.2, dropout_seed=seed
    )
    keep = torch.ops.torch_ext.attention_dropout_mask(seed, 0.2, (2, 3, 70, 70))
    twins = [t.detach().double().requires_grad_() for t in (query, key, value)]
    expected, _ = attention(*twins, dropout_p=0.2, keep=keep)
    bound = 2 * torch.finfo(dtype).eps
    assert relative_error(out, expected) <= bound
    grad_out = torch.randn(out.shape).to(dtype)
    for grad, exact in zip(
        torch.autograd.grad(out, (query, key, value), grad_out),
        torch.autograd.grad(expected, twins, grad_out.double()),
        strict=True,
    ):
        assert relative_error(grad, exact) <= bound


def test_sdpa_uses_the_seed_that_it_draws() -> None:
    query, key, value = _random(2, 3, 40, 16)
    with _Seeds() as mode:
        torch.manual_seed(3)
        out = sdpa(query, key, value, dropout_p=0.4)
    (seed,) = mode.seeds
    assert seed.dtype is torch.int64
    assert seed.numel() == 1
    keep = torch.ops.torch_ext.attention_dropout_mask(seed, 0.4, (2, 3, 40, 40))
    expected, _ = attention(query, key, value, dropout_p=0.4, keep=keep)
    assert relative_error(out, expected) <= 3e-6


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.75])
def test_keep_rate(dropout_p: float) -> None:
    """Each weight is kept with probability 1 - p, whatever its row, column, head and batch."""
    sizes = (4, 4, 256, 256)
    keep = torch.ops.torch_ext.attention_dropout_mask(torch.tensor([42]), dropout_p, sizes).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        rates = keep.mean(dims)
        count = keep.numel() / rates.numel()
        # 5.5 standard deviations: one false alarm in some 10^5 runs of 256 rates.
        assert (rates - (1 - dropout_p)).abs().max() < 5.5 * deviation / count**0.5


def test_neighbours_are_independent() -> None:
    """No correlation along rows, columns, heads, batches, and between seeds that are neighbours."""
    sizes = (2, 2, 512, 512)
    masks = torch.stack(
        [
            torch.ops.torch_ext.attention_dropout_mask(torch.tensor([seed]), 0.5, sizes)
            for seed in (0, 1, 2, -1, 1 << 32, 1 << 62)
        ]
    ).double()
    signs = 2 * masks - 1
    limit = 6 / (2 * 2 * 512 * 511 - 0) ** 0.5
    for step in (1, 2, 4, 8, 16):
        assert abs((signs[0, ..., step:] * signs[0, ..., :-step]).mean()) < limit
        assert abs((signs[0, :, :, step:] * signs[0, :, :, :-step]).mean()) < limit
    assert abs((signs[0, :, 0] * signs[0, :, 1]).mean()) < 2 * limit
    assert abs((signs[0, 0] * signs[0, 1]).mean()) < 2 * limit
    for first in range(len(masks)):
        for second in range(first):
            assert abs((signs[first] * signs[second]).mean()) < limit


def test_unbiased() -> None:
    """The mean over many calls is the call without dropout."""
    query, key, value = _random(1, 2, 8, 16)
    calls = 600
    outs = torch.stack([sdpa(query, key, value, dropout_p=0.5) for _ in range(calls)])
    error = outs.mean(0) - sdpa(query, key, value)
    assert (error.abs() < 5.5 * outs.std(0) / calls**0.5).all()


def test_no_dropout() -> None:
    query, key, value = _random(2, 3, 40, 16)
    assert torch.equal(sdpa(query, key, value, dropout_p=0.0), sdpa(query, key, value))


@pytest.mark.parametrize("q_len", [1, 40])
def test_everything_dropped(q_len: int) -> None:
    query, key, value = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (q_len, 70, 70))
    mask = torch.randn(q_len, 70, requires_grad=True)
    out = sdpa(query, key, value, mask, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), (query, key, value, mask)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_everything_dropped_but_logsumexp() -> None:
    query, key, value = _random(2, 3, 40, 16)
    seed = torch.tensor([1])
    out, logsumexp = torch.ops.torch_ext.attention_forward(
        query, key, value, dropout_p=1.0, dropout_seed=seed
    )
    assert not out.any()
    assert torch.equal(logsumexp, torch.ops.torch_ext.attention_forward(query, key, value)[1])


def test_tiny_probability_is_not_lost_silently() -> None:
    """Below the resolution of 2^-16 the realised probability is what the factor makes up for."""
    assert dropout_factor(1e-9) == 1.0
    query, key, value = _random(1, 2, 40, 16)
    assert torch.equal(sdpa(query, key, value, dropout_p=1e-9), sdpa(query, key, value))


@pytest.mark.parametrize("q_len", [2, 150])
def test_same_for_every_thread_count(q_len: int, set_num_threads: Callable[[int], None]) -> None:
    query, key, value = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (q_len, 301, 301))
    results = []
    for threads in (1, 2, 3, 4):
        set_num_threads(threads)
        torch.manual_seed(9)
        out = sdpa(query, key, value, dropout_p=0.2)
        results.append([out, *torch.autograd.grad(out.sum(), (query, key, value))])
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine, first)


def test_backward_does_not_draw() -> None:
    """Another call in between, or a reseeded generator, changes no gradient."""
    query, key, value = (t.requires_grad_() for t in _random(2, 3, 40, 16))
    grads = []
    for disturb in (False, True):
        torch.manual_seed(4)
        out = sdpa(query, key, value, dropout_p=0.3)
        if disturb:
            torch.manual_seed(77)
            sdpa(query, key, value, dropout_p=0.3)
        state = torch.get_rng_state()
        grads.append(torch.autograd.grad(out.sum(), (query, key, value)))
        assert torch.equal(torch.get_rng_state(), state)
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_is_exact(use_reentrant: bool) -> None:
    inputs = [t.requires_grad_() for t in _random(2, 3, 40, 16)]

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query.sin(), key, value, dropout_p=0.3, is_causal=True) * 2

    torch.manual_seed(5)
    plain = block(*inputs)
    plain_grads = torch.autograd.grad(plain.sum(), inputs)
    torch.manual_seed(5)
    saved = checkpoint(block, *inputs, use_reentrant=use_reentrant)
    torch.manual_seed(6)
    saved.sum().backward()
    assert torch.equal(saved, plain)
    for tensor, grad in zip(inputs, plain_grads, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_mask_of_broadcast_batches_is_per_batch() -> None:
    """Batches and heads that share K and V, or everything, still get masks of their own."""
    query = torch.randn(1, 1, 20, 16)
    out = sdpa(query.expand(3, 4, 20, 16), query, query, dropout_p=0.5)
    flat = out.flatten(0, 1)
    for first in range(12):
        for second in range(first):
            assert not torch.equal(flat[first], flat[second])
