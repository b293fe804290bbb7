"""Every way to do a mini-batch workload: ours, and the ways that PyTorch itself offers.

A new kind of workload is a function and a line in CALLS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accumulation_workloads import OURS, Shapes, Workload
from torch import Tensor
from training_windows import mlp_window, parallel_window

import torch_ext  # noqa: F401  registers the operators

OPS = torch.ops.torch_ext
Call = Callable[[], object]
_LR = 1e-6  # nothing drifts far in a few hundred steps


def _random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _gradient_dtype(workload: Workload) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return dtype


def accumulate(workload: Workload) -> dict[str, Call]:
    """Gradients added to float32 accumulators."""
    dtype = _gradient_dtype(workload)
    accumulators, grads = _random(workload.shapes), _random(workload.shapes, dtype)

    def loop() -> None:
        for accumulator, grad in zip(accumulators, grads, strict=True):
            accumulator.add_(grad)

    calls: dict[str, Call] = {
        OURS: lambda: OPS.grad_accumulate_(accumulators, grads),
        "loop of add_": loop,
        "_foreach_add_": lambda: torch._foreach_add_(accumulators, grads),
    }
    if dtype is not torch.float32:
        calls["_foreach_add_ of casts"] = lambda: torch._foreach_add_(
            accumulators, [grad.float() for grad in grads]
        )
    return calls


def norm(workload: Workload) -> dict[str, Call]:
    """The global norm, and whether any element is infinite or NaN."""
    grads = _random(workload.shapes)
    found_inf, scale = torch.zeros(()), torch.ones(())

    def unscale_and_norm() -> Tensor:
        """What GradScaler.unscale_ and clip_grad_norm_ do."""
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, scale)
        return torch.nn.utils.get_total_norm(grads)

    def norm_and_its_finiteness() -> Tensor:
        """One read: any bad element shows in the norm, and so does an overflow of its own."""
        return torch.nn.utils.get_total_norm(grads).isfinite()

    return {
        OURS: lambda: OPS.grad_stats(grads),
        "unscale and get_total_norm": unscale_and_norm,
        "get_total_norm, isfinite": norm_and_its_finiteness,
    }


class _Parameters:
    """Parameters with .grad, an optimizer of torch's, and the same tensors for ours."""

    def __init__(self, workload: Workload) -> None:
        self.leaves = [torch.nn.Parameter(t) for t in _random(workload.shapes)]
        for leaf in self.leaves:
            leaf.grad = torch.randn_like(leaf)
        self.params = [leaf.detach() for leaf in self.leaves]
        self.grads = [leaf.grad for leaf in self.leaves]
        self.is_adam = workload.optimizer == "AdamW"
        if self.is_adam:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.leaves, lr=_LR, weight_decay=0.01, fused=True
            )
        else:
            self.optimizer = torch.optim.SGD(self.leaves, lr=_LR, momentum=0.9, fused=True)
        self.optimizer.step()  # makes its state

    def state(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[leaf][name] for leaf in self.leaves]

    def torch_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def our_step(self, **options: Tensor) -> None:
        if self.is_adam:
            OPS.adamw_step_(
                self.params,
                self.grads,
                self.state("exp_avg"),
                self.state("exp_avg_sq"),
                [],
                [],
                self.state("step"),
                lr=_LR,
                weight_decay=0.01,
                **options,
            )
        else:
            OPS.sgd_step_(
                self.params,
                self.grads,
                self.state("momentum_buffer"),
                [],
                lr=_LR,
                momentum=0.9,
                **options,
            )


def step(workload: Workload) -> dict[str, Call]:
    """An optimizer's step, after which the gradients are 0."""
    parameters = _Parameters(workload)
    name = f"fused {workload.optimizer} and zero_grad"
    return {OURS: parameters.our_step, name: parameters.torch_step}


def clip_step(workload: Workload) -> dict[str, Call]:
    """The same with the gradients clipped by their global norm first."""
    parameters = _Parameters(workload)

    def ours() -> None:
        total, _, found_inf = OPS.grad_stats(parameters.grads)
        coefficient = (1.0 / (total + 1e-6)).clamp(max=1.0)
        parameters.our_step(coefficient=coefficient, found_inf=found_inf)

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.leaves, 1.0)
        parameters.torch_step()

    return {OURS: ours, f"clip_grad_norm_, fused {workload.optimizer}, zero_grad": torchs}


def weight_gradient(workload: Workload) -> dict[str, Call]:
    """Each layer's weight gradient added to its float32 accumulator."""
    dtype = _gradient_dtype(workload)
    accumulators = _random(workload.shapes)
    out_features, in_features = workload.shapes[0]
    rows: Sequence[tuple[Tensor, Tensor]] = [
        (
            torch.randn(workload.tokens, out_features).to(dtype),
            torch.randn(workload.tokens, in_features).to(dtype),
        )
        for _ in accumulators
    ]

    def each(one: Callable[[Tensor, Tensor, Tensor], object]) -> Call:
        def call() -> None:
            for accumulator, (grad, value) in zip(accumulators, rows, strict=True):
                one(accumulator, grad, value)

        return call

    calls = {
        OURS: each(lambda w, g, x: OPS.linear_wgrad_(w, None, g, x)),
        "mm and add_": each(lambda w, g, x: w.add_(g.t() @ x)),
    }
    if dtype is torch.float32:
        calls["addmm_"] = each(lambda w, g, x: w.addmm_(g.t(), x))
    else:
        calls["addmm_ of casts"] = each(lambda w, g, x: w.addmm_(g.float().t(), x.float()))
    return calls


def embedding_gradient(workload: Workload) -> dict[str, Call]:
    """The rows of an embedding that a micro-batch's tokens name."""
    num_embeddings, dim = workload.shapes[0]
    weight = torch.zeros(num_embeddings, dim)
    indices = torch.randint(num_embeddings, (workload.tokens,))
    grads = torch.randn(workload.tokens, dim).to(_gradient_dtype(workload))

    def dense() -> None:
        weight.add_(
            torch.ops.aten.embedding_dense_backward(grads, indices, num_embeddings, -1, False)
        )

    return {
        OURS: lambda: OPS.embedding_wgrad_(weight, indices, grads),
        "embedding_dense_backward, add_": dense,
        "index_add_ of casts": lambda: weight.index_add_(0, indices, grads.float()),
    }


CALLS: dict[str, Callable[[Workload], dict[str, Call]]] = {
    "accumulate": accumulate,
    "norm": norm,
    "step": step,
    "clip_step": clip_step,
    "weight_gradient": weight_gradient,
    "embedding_gradient": embedding_gradient,
    "mlp_window": mlp_window,
    "parallel_window": parallel_window,
}


def calls_of(workload: Workload) -> dict[str, Call]:
    """Every way to do it on the same tensors, ours among them. The same numbers at every call."""
    torch.manual_seed(0)
    return CALLS[workload.kind](workload)
