"""What the mini-batch operators refuse, in words that name the operator, the argument, what it got
and what it takes; and that nothing was written by then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accumulation_cases import OPS, nonzero
from accumulation_refusals import accumulate, adamw, embedding, ones, refuses, sgd, wgrad
from torch import Tensor


def _nested() -> Tensor:
    return torch.nested.nested_tensor([ones(2), ones(3)], layout=torch.jagged)


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(ones(3, 4), 0.1, 0, torch.quint8)


KINDS = [
    (lambda: ones(3, 4, dtype=torch.int32), "takes Float, Double, BFloat16 or Half, got Int"),
    (lambda: ones(3, 4, dtype=torch.bool), "takes Float, Double, BFloat16 or Half, got Bool"),
    (
        lambda: ones(3, 4, dtype=torch.complex64),
        "takes a real tensor; complex tensors are not supp",
    ),
    (
        lambda: ones(3, 4).to_sparse(),
        "takes a dense tensor; sparse tensors are not supported, got layout Sparse",
    ),
    (_quantized, "takes a floating tensor; quantized tensors are not supported"),
    (
        lambda: ones(3, 4, dtype=torch.float8_e4m3fn),
        "takes Float, Double, BFloat16 or Half, got Float8_e4m3fn",
    ),
]


@pytest.mark.parametrize(("bad", "message"), KINDS)
def test_kinds_of_tensors(bad: Callable[[], Tensor], message: str) -> None:
    good = nonzero(3, 4)
    refuses(accumulate([good, bad()], [ones(3, 4), ones(3, 4)]), rf"accumulators\[1\] {message}")
    refuses(accumulate([good], [bad()]), rf"grad_accumulate_: grads\[0\] {message}")
    refuses((OPS.grad_stats, ([good, bad()],), {}), rf"grad_stats: grads\[1\] {message}")
    for name in ("params", "accumulators", "exp_avgs", "exp_avg_sqs"):
        refuses(adamw(**{name: [good, bad()]}), rf"adamw_step_: {name}\[1\] {message}")
    for name in ("params", "accumulators", "momentum_buffers", "master_params"):
        refuses(sgd(**{name: [good.clone(), bad()]}), rf"sgd_step_: {name}\[1\] {message}")
    refuses(wgrad(bad(), None, ones(2, 3), ones(2, 4)), f"linear_wgrad_: weight_grad {message}")
    refuses(wgrad(good, None, bad(), ones(3, 4)), f"linear_wgrad_: grad_output {message}")
    refuses(wgrad(good, None, ones(3, 3), bad()), f"linear_wgrad_: input {message}")
    refuses(wgrad(good, bad(), ones(2, 3), ones(2, 4)), f"linear_wgrad_: bias_grad {message}")
    index = torch.tensor([0, 1, 2])
    refuses(embedding(bad(), index, ones(3, 4)), f"embedding_wgrad_: weight_grad {message}")
    refuses(embedding(good, index, bad()), f"embedding_wgrad_: grad_output {message}")


def test_nested_tensors() -> None:
    message = "takes a dense tensor; nested tensors are not supported"
    refuses(accumulate([nonzero(2)], [_nested()]), rf"grads\[0\] {message}", Exception)
    refuses((OPS.grad_stats, ([_nested()],), {}), rf"grads\[0\] {message}", Exception)


def test_lengths_of_lists() -> None:
    takes = "takes as many entries as"
    refuses(accumulate([nonzero(2)], []), f"grad_accumulate_: grads {takes} accumulators, 1, got 0")
    refuses(accumulate([], [nonzero(2)]), f"grad_accumulate_: .*{takes}|one length")
    for name in ("accumulators", "exp_avgs", "exp_avg_sqs", "steps"):
        refuses(adamw(**{name: [ones(3, 4)]}), f"adamw_step_: {name} {takes} params, 2, got 1")
    refuses(
        adamw(master_params=[ones(3, 4)]), f"adamw_step_: master_params {takes} params, 2, got 1"
    )
    refuses(adamw(amsgrad=True), f"adamw_step_: max_exp_avg_sqs {takes} params, 2, got 0")
    refuses(sgd(momentum_buffers=[]), f"sgd_step_: momentum_buffers {takes} params, 2, got 0")
    refuses(sgd(first_step=[True]), f"sgd_step_: first_step {takes} params, 2, got 1")
    refuses(
        adamw(max_exp_avg_sqs=[ones(3, 4)] * 2),
        "adamw_step_: max_exp_avg_sqs takes an empty list unless amsgrad=True, got 2 entries",
    )
    refuses(
        sgd(momentum=0.0),
        "sgd_step_: momentum_buffers takes an empty list unless momentum > 0, got 2 entries",
    )


def test_lists_of_none_beside_others() -> None:
    for name in ("accumulators", "exp_avgs", "steps", "master_params"):
        refuses(adamw(0, **{name: [ones(3, 4)]}), f"adamw_step_: {name} takes .*got 1")
    for name in ("accumulators", "momentum_buffers"):
        refuses(sgd(0, **{name: [ones(3, 4)]}), f"sgd_step_: {name} takes .*got 1")
    refuses(adamw(0, lr=-1.0), "adamw_step_: lr takes a number >= 0, got -1")
    refuses(sgd(0, momentum=-1.0), "sgd_step_: momentum takes a number >= 0, got -1")


def test_sizes() -> None:
    refuses(
        accumulate([nonzero(3, 4), nonzero(2)], [ones(3, 4), ones(3)]),
        r"grad_accumulate_: grads\[1\] takes the sizes of accumulators\[1\], \[2\], got \[3\]",
    )
    refuses(
        accumulate([nonzero(3, 4)], [ones(4)]), r"grads\[0\] takes the sizes"
    )  # no broadcasting
    for name in ("accumulators", "exp_avgs", "exp_avg_sqs", "master_params"):
        refuses(
            adamw(**{name: [nonzero(3, 4), nonzero(4, 3)]}),
            rf"adamw_step_: {name}\[1\] takes the sizes of params\[1\], \[3, 4\], got \[4, 3\]",
        )
    refuses(
        sgd(momentum_buffers=[nonzero(3, 4), nonzero(12)]),
        r"sgd_step_: momentum_buffers\[1\] takes the sizes of params\[1\], \[3, 4\], got \[12\]",
    )
    refuses(
        adamw(steps=[ones(), ones(2)]),
        r"adamw_step_: steps\[1\] takes a Float or Double tensor of one element, got Float with "
        r"sizes \[2\]",
    )
    refuses(
        adamw(steps=[ones(), torch.tensor(1.0, dtype=torch.bfloat16)]),
        r"steps\[1\] takes a Float or Double tensor of one element, got BFloat16",
    )


@pytest.mark.parametrize("name", ["coefficient", "found_inf", "lr"])
def test_scalars_of_steps(name: str) -> None:
    for call in (adamw, sgd):
        message = f"{name} takes a tensor of one element, got sizes "
        refuses(call(**{name: ones(2)}), message + r"\[2\]")
        refuses(call(**{name: ones(0)}), message + r"\[0\]")
        refuses(
            call(**{name: torch.tensor(1)}),
            f"{name} takes Float, Double, BFloat16 or Half, got Long",
        )


def test_scale() -> None:
    lists = [nonzero(3)], [ones(3)]
    refuses(
        accumulate(*lists, scale=ones(2)),
        r"grad_accumulate_: scale takes a tensor of one element, got sizes \[2\]",
    )
    refuses(accumulate(*lists, scale=torch.tensor(2)), "scale takes Float, .* got Long")
    refuses(accumulate(*lists, scale=ones(device="meta")), "scale takes a tensor on cpu")


def test_devices() -> None:
    meta = ones(3, 4, device="meta")
    message = "takes a tensor on cpu like the others, got one on meta"
    refuses(accumulate([nonzero(3, 4)], [meta]), rf"grad_accumulate_: grads\[0\] {message}")
    refuses(
        accumulate([nonzero(3, 4), meta], [nonzero(3, 4)] * 2),
        rf"grad_accumulate_: accumulators\[1\] {message}",
    )
    refuses((OPS.grad_stats, ([nonzero(2), meta],), {}), rf"grad_stats: grads\[1\] {message}")
    refuses(
        wgrad(nonzero(3, 4), None, ones(2, 3, device="meta"), ones(2, 4)), "grad_output " + message
    )
    refuses(
        wgrad(nonzero(3, 4), ones(3, device="meta"), ones(2, 3), ones(2, 4)), "bias_grad " + message
    )
    refuses(
        embedding(nonzero(3, 4), torch.zeros(2, dtype=torch.long, device="meta"), ones(2, 4)),
        "indices " + message,
    )
    for name in ("accumulators", "exp_avgs"):
        refuses(adamw(**{name: [nonzero(3, 4), meta]}), rf"{name}\[1\] {message}")
    refuses(adamw(steps=[ones(), ones(device="meta")]), rf"steps\[1\] {message}")
    refuses(adamw(found_inf=ones(device="meta")), f"found_inf {message}")
    refuses(sgd(coefficient=ones(device="meta")), f"coefficient {message}")


def test_linear_shapes() -> None:
    weight = nonzero(3, 4)
    refuses(
        wgrad(nonzero(12), None, ones(2, 3), ones(2, 4)),
        r"linear_wgrad_: weight_grad takes the sizes \(out_features, in_features\), got \[12\]",
    )
    refuses(
        wgrad(weight, None, ones(2, 5), ones(2, 4)),
        r"grad_output takes the sizes \(tokens..., out_features\), out_features = 3, got \[2, 5\]",
    )
    refuses(wgrad(weight, None, ones(), ones(2, 4)), r"grad_output takes the sizes")
    for value in (ones(2, 5), ones(3, 4), ones(1, 2, 4), ones(4)):
        refuses(
            wgrad(weight, None, ones(2, 3), value),
            r"input takes the sizes \(tokens..., in_features\) with the tokens of grad_output, "
            r"\[2, 3\], and in_features = 4, got",
        )
    for bias in (ones(4), ones(3, 1), ones()):
        refuses(
            wgrad(weight, bias, ones(2, 3), ones(2, 4)),
            r"bias_grad takes the sizes \(out_features\), out_features = 3, got",
        )


def test_embedding_arguments() -> None:
    weight = nonzero(5, 4)
    index = torch.tensor([0, 1])
    refuses(
        embedding(nonzero(20), index, ones(2, 4)),
        r"embedding_wgrad_: weight_grad takes the sizes \(num_embeddings, dim\), got \[20\]",
    )
    refuses(
        embedding(weight, ones(2), ones(2, 4)),
        "indices takes a dense tensor of Long or Int, got Float",
    )
    refuses(embedding(weight, index.bool(), ones(2, 4)), "indices takes .* got Bool")
    for grad in (ones(2, 5), ones(3, 4), ones(1, 2, 4), ones(4)):
        refuses(
            embedding(weight, index, grad),
            r"grad_output takes the sizes of indices, \[2\], and dim = 4, got",
        )
    for bad in (5, -1, 2**40):
        refuses(
            embedding(weight, torch.tensor([0, bad]), ones(2, 4)),
            rf"indices takes rows of weight_grad, 0 to 4, got {bad}",
            IndexError,
        )
    refuses(
        embedding(torch.empty(0, 4), torch.tensor([0]), ones(1, 4)),
        "indices takes rows of weight_grad, of which there are none, got 0",
        IndexError,
    )


def test_ranges() -> None:
    for call in (adamw, sgd):
        for lr in (-0.1, float("nan"), torch.tensor(-0.1), torch.tensor(float("nan"))):
            refuses(call(lr=lr), "lr takes a number >= 0, got (-0.1|-?nan)")
        refuses(call(weight_decay=-0.1), "weight_decay takes a number >= 0, got -0.1")
    refuses(adamw(eps=-1e-8), "adamw_step_: eps takes a number >= 0, got -1e-08")
    for name in ("beta1", "beta2"):
        for value in (-0.1, 1.0, float("nan")):
            refuses(adamw(**{name: value}), rf"adamw_step_: {name} takes a number in \[0, 1\), got")
    refuses(sgd(momentum=-0.1), "sgd_step_: momentum takes a number >= 0, got -0.1")
    takes = "sgd_step_: nesterov takes momentum > 0 and dampening = 0, got momentum "
    refuses(sgd(nesterov=True, dampening=0.1), takes + "0.9 and dampening 0.1")
    refuses(sgd(nesterov=True, momentum=0.0, momentum_buffers=[]), takes + "0 and dampening 0")


def test_leaves_that_require_grad() -> None:
    leaf = nonzero(3, 4).requires_grad_()
    takes = "takes a buffer, got a leaf that requires grad"
    with torch.no_grad():
        refuses(
            accumulate([nonzero(2), leaf], [ones(2), ones(3, 4)]), rf"accumulators\[1\] {takes}"
        )
        refuses(wgrad(leaf, None, ones(2, 3), ones(2, 4)), f"weight_grad {takes}")
        bias = nonzero(3).requires_grad_()
        refuses(wgrad(nonzero(3, 4), bias, ones(2, 3), ones(2, 4)), f"bias_grad {takes}")
        refuses(embedding(leaf, torch.tensor([0]), ones(1, 4)), f"weight_grad {takes}")
        refuses(adamw(accumulators=[nonzero(3, 4), leaf]), rf"accumulators\[1\] {takes}")
        OPS.grad_accumulate_([leaf.detach()], [leaf])  # read, and written through an alias: fine
    with torch.no_grad():  # parameters are what a step writes
        call = adamw(params=[leaf, nonzero(3, 4)])
        call[0](*call[1], **call[2])


@pytest.mark.parametrize("requires_grad", ["leaf", "result"])
def test_tensors_that_require_grad_while_grad_mode_is_on(requires_grad: str) -> None:
    tensor = nonzero(3, 4).requires_grad_()
    if requires_grad == "result":
        tensor = tensor * 2
    takes = "takes a tensor that does not require grad while grad mode is on, got one that does: "
    written = takes + r"it is written; call the operator under torch.no_grad\(\)"
    read = takes + "the operator is not differentiable; detach it"
    good = nonzero(3, 4)
    refuses(
        accumulate([good, tensor], [good] * 2), rf"grad_accumulate_: accumulators\[1\] {written}"
    )
    refuses(accumulate([good], [tensor]), rf"grad_accumulate_: grads\[0\] {read}")
    refuses(wgrad(tensor, None, ones(2, 3), ones(2, 4)), f"linear_wgrad_: weight_grad {written}")
    refuses(wgrad(good, None, tensor.t(), ones(4, 4)), f"linear_wgrad_: grad_output {read}")
    refuses(embedding(tensor, torch.tensor([0]), ones(1, 4)), f"_wgrad_: weight_grad {written}")
    refuses(adamw(params=[tensor, good]), rf"adamw_step_: params\[0\] {written}")
    refuses(sgd(momentum_buffers=[good, tensor]), rf"sgd_step_: momentum_buffers\[1\] {written}")
    refuses(sgd(coefficient=tensor.sum()), f"sgd_step_: coefficient {read}")


def test_none_where_a_tensor_belongs() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        OPS.grad_accumulate_([None], [ones(2)])
    with pytest.raises((RuntimeError, TypeError)):
        OPS.linear_wgrad_(None, None, ones(2, 3), ones(2, 4))
