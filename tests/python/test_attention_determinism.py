"""The same bits for every thread count, in every run, and for calls from many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from attention_cases import DTYPES, AttentionCase
from torch import Tensor

CASES = [
    # fewer (batch, head) pairs than threads: queries and keys are split
    AttentionCase((1, 1, 300, 32), (1, 1, 500, 32)),
    AttentionCase((1, 1, 1000, 16), (1, 1, 40, 16)),
    AttentionCase((1, 1, 40, 16), (1, 1, 1500, 16)),
    # decode, keys split
    AttentionCase((1, 1, 1, 64), (1, 1, 3000, 64)),
    AttentionCase((1, 8, 1, 32), (1, 2, 1500, 32), enable_gqa=True),
    # more pairs, uneven work
    AttentionCase((2, 3, 130, 16), (2, 3, 130, 16), is_causal=True),
    AttentionCase((1, 4, 70, 16), (1, 2, 200, 16), enable_gqa=True, mask=(4, 70, 200)),
    # gradients of masks: sums over batches, heads, queries and keys
    AttentionCase((5, 3, 40, 16), (5, 3, 50, 16), mask=(40, 50)),
    AttentionCase((3, 2, 300, 16), (3, 2, 300, 16), mask=(3, 1, 1, 300)),
    AttentionCase((2, 2, 300, 16), (2, 2, 300, 16), mask=(2, 300, 1)),
    AttentionCase((4, 2, 70, 16), (4, 2, 300, 16), mask=(1,)),
    AttentionCase((2, 2, 200, 16), (2, 2, 200, 16), mask=(200, 200), mask_dtype=torch.bool),
    # gradients of broadcast inputs: sums over batches
    AttentionCase((1, 2, 70, 16), (4, 1, 90, 16), padding=(4, 90)),
]


def _results(case: AttentionCase, inputs: list[Tensor | None], padding: Tensor | None):  # type: ignore[no-untyped-def]
    out, logsumexp = torch.ops.torch_ext.attention_forward(
        *inputs, key_padding_mask=padding, **case.options
    )
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad(
        [out, logsumexp], leaves, [torch.cos(out.detach() * 7), torch.ones_like(logsumexp)]
    )
    return [out.detach(), logsumexp.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_counts(
    case: AttentionCase, dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    tensors = case.tensors(dtype)
    arguments = (case, list(tensors.inputs), tensors.key_padding_mask)
    set_num_threads(1)
    first = _results(*arguments)
    for threads in (1, 2, 3, 4):
        set_num_threads(threads)
        for mine, expected in zip(_results(*arguments), first, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_attention_thread_counts(
    dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    qkv = torch.randn(2, 130, 3 * 48, dtype=dtype, requires_grad=True)
    mask = torch.randn(3, 1, 130, dtype=dtype, requires_grad=True)
    results = []
    for threads in (1, 2, 3, 4):
        set_num_threads(threads)
        out, _ = torch.ops.torch_ext.packed_attention_forward(qkv, 3, mask)
        results.append([out, *torch.autograd.grad(out.sum(), (qkv, mask))])
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            assert torch.equal(mine, expected)


def test_repeated_runs(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(4)
    case = AttentionCase((1, 2, 200, 32), (1, 2, 300, 32), mask=(2, 1, 300))
    tensors = case.tensors(torch.float32)
    first = _results(case, list(tensors.inputs), None)
    for _ in range(20):
        for mine, expected in zip(_results(case, list(tensors.inputs), None), first, strict=True):
            assert torch.equal(mine, expected)


def test_inference_path_gives_the_same_bits() -> None:
    """Without autograd the call goes straight to the kernels."""
    for case in CASES:
        if case.padding is not None or case.causal_offset:
            continue
        tensors = case.tensors(torch.float32)
        options = {k: v for k, v in case.options.items() if k != "causal_offset"}
        op = torch.ops.torch_ext.scaled_dot_product_attention
        recorded = op(*tensors.inputs, **options)
        with torch.no_grad():
            plain = op(*tensors.inputs, **options)
        with torch.inference_mode():
            inference = op(*tensors.inputs, **options)
        assert torch.equal(recorded, plain)
        assert torch.equal(recorded, inference.clone())
        assert recorded.stride() == plain.stride() == inference.stride()


@pytest.mark.parametrize("intra_threads", [1, 2])
def test_many_threads_at_once(intra_threads: int, set_num_threads: Callable[[int], None]) -> None:
    """8 Python threads, forward and backward, different calls at once: each gets its own."""
    set_num_threads(intra_threads)
    jobs = []
    for case, dtype in zip(CASES, [*DTYPES, *DTYPES, *DTYPES, *DTYPES], strict=False):
        tensors = case.tensors(dtype)
        arguments = (case, list(tensors.inputs), tensors.key_padding_mask)
        jobs.append((arguments, _results(*arguments)))
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        try:
            torch.set_num_threads(intra_threads)
            start.wait()
            for step in range(3 * len(jobs)):
                arguments, expected = jobs[(step * (worker + 1) + worker) % len(jobs)]
                for mine, right in zip(_results(*arguments), expected, strict=True):
                    if not torch.equal(mine, right):
                        failures.append(f"thread {worker}: {arguments[0]}")
        except Exception as error:
            failures.append(f"thread {worker}: {error!r}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_dropout_from_many_threads() -> None:
    """The generator is shared: seeds are drawn under its lock, and no two calls get the same."""
    query = torch.randn(1, 1, 30, 16)
    outs: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            outs.append(
                torch.ops.torch_ext.scaled_dot_product_attention(query, query, query, None, 0.5)
            )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({out.numpy().tobytes() for out in outs}) == 160
