"""Destinations of the mini-batch operators that share memory with each other, themselves or
what is read: refused, unless they only look as if they did."""

from __future__ import annotations

import torch
from accumulation_cases import OPS, nonzero
from accumulation_refusals import accumulate, adamw, embedding, ones, refuses, sgd, wgrad


def test_the_same_tensor_twice() -> None:
    one, other = nonzero(3, 4), nonzero(3, 4)
    grads = [ones(3, 4)] * 3
    twice = "takes a tensor of its own, got the one that is"
    refuses(
        accumulate([one, other, one], grads),
        rf"grad_accumulate_: accumulators\[2\] {twice} accumulators\[0\] too",
    )
    refuses(accumulate([one, one.view(3, 4), other], grads), rf"accumulators\[1\] {twice}")
    refuses(adamw(params=[one, one]), rf"params\[1\] {twice} params\[0\] too")
    refuses(adamw(exp_avgs=[one, other], exp_avg_sqs=[other, nonzero(3, 4)]), twice)
    step = ones()
    refuses(adamw(steps=[step, step]), rf"steps\[1\] {twice} steps\[0\] too")
    refuses(sgd(accumulators=[one, other], momentum_buffers=[nonzero(3, 4), one]), twice)
    weight = nonzero(3, 1)
    refuses(
        wgrad(weight, weight[:, 0], ones(2, 3), ones(2, 1)), "bias_grad takes memory of its own"
    )


def test_overlaps() -> None:
    storage = nonzero(20)
    overlaps = "takes memory of its own, got a tensor that overlaps"
    refuses(
        accumulate([storage[:12], storage[8:]], [ones(12), ones(12)]),
        rf"accumulators\[1\] {overlaps} accumulators\[0\]",
    )
    refuses(accumulate([storage[:12]], [storage[8:]]), rf"grads\[0\] {overlaps} accumulators\[0\]")
    refuses(accumulate([storage[:10], storage[10:]], [storage[10:], ones(10)]), overlaps + "|own")
    refuses(accumulate([storage[:2]], [ones(2)], scale=storage[1]), f"scale {overlaps}")
    refuses(accumulate([storage[::2]], [storage[1:11]]), overlaps)
    refuses(accumulate([storage[:3]], [storage[:1].expand(3)]), overlaps)
    square = nonzero(4, 4)
    refuses(accumulate([square], [square.t()]), overlaps)
    refuses(adamw(2, accumulators=[square[:3], square[1:]]), overlaps)
    refuses(
        adamw(coefficient=(found := nonzero(1)), found_inf=found, steps=[found, ones(1)]), "own"
    )
    weight = nonzero(4, 4)
    refuses(
        wgrad(weight, None, weight, ones(4, 4)), f"grad_output {overlaps}|grad_output takes a t"
    )
    refuses(wgrad(weight, None, ones(4, 4), weight[:, :4]), "input takes")
    refuses(embedding(weight, torch.tensor([0, 1]), weight[2:]), f"grad_output {overlaps}")


def test_two_storages_over_the_same_memory() -> None:
    """NumPy's views become tensors with storages of their own, which begin where they like."""
    owned = nonzero(20)
    array = owned.numpy()
    whole, middle, end = (torch.from_numpy(part) for part in (array, array[4:12], array[12:]))
    overlaps = "takes memory of its own, got a tensor that overlaps"
    refuses(accumulate([whole, middle], [ones(20), ones(8)]), rf"accumulators\[1\] {overlaps}")
    refuses(accumulate([owned, middle], [ones(20), ones(8)]), rf"accumulators\[1\] {overlaps}")
    refuses(accumulate([owned[:8]], [middle]), rf"grads\[0\] {overlaps} accumulators\[0\]")
    refuses(accumulate([middle], [owned[:8]]), rf"grads\[0\] {overlaps} accumulators\[0\]")
    OPS.grad_accumulate_([middle, end], [ones(8), ones(8)])
    OPS.grad_accumulate_([owned[:4]], [torch.from_numpy(array[4:8])])


def test_interleaved_tensors_do_not_overlap() -> None:
    storage = nonzero(20)
    OPS.grad_accumulate_([storage[::2], storage[1::2]], [ones(10), ones(10)])
    halves = nonzero(4, 8)
    OPS.grad_accumulate_([halves[:, :4], halves[:, 4:]], [ones(4, 4), ones(4, 4)])
    OPS.grad_accumulate_([storage[::2]], [storage[1::2]])
    many = nonzero(5000)
    OPS.grad_accumulate_(list(many.split(50)), list(nonzero(5000).split(50)))
    shuffled = [many.split(50)[i] for i in torch.randperm(100)]
    OPS.grad_accumulate_(shuffled, [ones(50)] * 100)


def test_tensors_that_overlap_themselves() -> None:
    message = "takes a tensor whose elements have places of their own, got strides"
    expanded = nonzero(3).expand(4, 3)
    refuses(accumulate([expanded], [ones(4, 3)]), rf"accumulators\[0\] {message} \[0, 1\]")
    windows = nonzero(10).unfold(0, 3, 1)
    refuses(accumulate([windows], [ones(8, 3)]), rf"accumulators\[0\] {message}")
    refuses(wgrad(expanded, None, ones(2, 4), ones(2, 3)), f"weight_grad {message}")
    refuses(
        wgrad(nonzero(4, 3), nonzero(1).expand(4), ones(2, 4), ones(2, 3)), f"bias_grad {message}"
    )
    refuses(embedding(expanded, torch.tensor([0]), ones(1, 3)), f"weight_grad {message}")
    refuses(adamw(1, params=[nonzero(4).expand(3, 4)]), rf"params\[0\] {message}")
    # Strides that interleave without meeting are fine.
    woven = nonzero(24).as_strided((4, 3), (3, 4))
    OPS.grad_accumulate_([woven], [ones(4, 3)])
