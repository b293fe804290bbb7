"""The mini-batch operators on one GPU against torch's: foreach, fused AdamW, clip_grad_norm_, mm.

python benchmarks/gpu_mini_batches.py [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cuda_timing import captured, copy_bandwidth, measure_in_turn
from torch import Tensor

import torch_ext  # noqa: F401  registers the operators

DEVICE = "cuda"
OPS = torch.ops.torch_ext
Call = Callable[[], object]


@dataclass
class Row:
    """One workload: ours, ours as a graph's replay, and torch's ways.

    ``bytes``: what has to be read and written at least; ``fraction``: of the copy bandwidth to
    reach with it, by the replay. ``ratio``: against the fastest of torch's.
    """

    name: str
    ours: Call
    peers: dict[str, Call]
    bytes: float = 0.0
    fraction: float | None = None
    ratio: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def _random(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def _model_shapes(elements: int) -> list[tuple[int, ...]]:
    """96 tensors of unequal sizes, so many elements in all: layers' weights and their biases."""
    unit = elements // (24 * 12)
    layer: list[tuple[int, ...]] = [(unit * 3,), (unit,), (unit * 4 - 7,), (unit * 4 + 7,)]
    return layer * 24


def accumulate_rows(elements: int) -> list[Row]:
    rows = []
    shapes = _model_shapes(elements)
    for dtype in (torch.float32, torch.bfloat16):
        accumulators, grads = _random(shapes), _random(shapes, dtype)
        name = str(dtype).removeprefix("torch.")

        def loop(accumulators: list[Tensor] = accumulators, grads: list[Tensor] = grads) -> None:
            for accumulator, grad in zip(accumulators, grads, strict=True):
                accumulator.add_(grad)

        total = sum(grad.numel() for grad in grads)
        rows.append(
            Row(
                f"accumulate {name} into float32, {total / 1e6:.0f} M in {len(shapes)}",
                lambda a=accumulators, g=grads: OPS.grad_accumulate_(a, g),
                {"add_ loop": loop, "foreach": lambda a=accumulators, g=grads: _foreach(a, g)},
                bytes=total * (8.0 + grads[0].element_size()),
                fraction=0.9,
            )
        )
    for dtype in (torch.float32, torch.bfloat16):
        accumulators, grads = _random([(64,)] * 2000), _random([(64,)] * 2000, dtype)
        name = str(dtype).removeprefix("torch.")
        rows.append(
            Row(
                f"accumulate {name} into float32, 2000 tensors of 64",
                lambda a=accumulators, g=grads: OPS.grad_accumulate_(a, g),
                {"foreach": lambda a=accumulators, g=grads: _foreach(a, g)},
                ratio=1.5,
            )
        )
    return rows


def _foreach(accumulators: list[Tensor], grads: list[Tensor]) -> None:
    if grads[0].dtype is not torch.float32:
        grads = [grad.float() for grad in grads]
    torch._foreach_add_(accumulators, grads)


def norm_rows(elements: int) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        grads = _random(_model_shapes(elements), dtype)
        total = sum(grad.numel() for grad in grads)
        name = str(dtype).removeprefix("torch.")
        rows.append(
            Row(
                f"norm and inf check {name}, {total / 1e6:.0f} M",
                lambda g=grads: OPS.grad_stats(g),
                {"get_total_norm": lambda g=grads: torch.nn.utils.get_total_norm(g, foreach=True)},
                bytes=total * float(grads[0].element_size()),
                fraction=0.9,
            )
        )
    return rows


def step_rows(elements: int) -> list[Row]:
    shapes = _model_shapes(elements)
    params, grads = _random(shapes), _random(shapes)
    averages, squares = _random(shapes), [g.square() for g in _random(shapes)]
    steps = [torch.zeros((), device=DEVICE) for _ in shapes]
    total = sum(param.numel() for param in params)

    def ours() -> None:
        norm, _, found_inf = OPS.grad_stats(grads)
        coefficient = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        OPS.adamw_step_(
            params,
            grads,
            averages,
            squares,
            [],
            [],
            steps,
            lr=1e-6,
            weight_decay=0.01,
            coefficient=coefficient,
            found_inf=found_inf,
        )

    leaves = [param.clone().requires_grad_() for param in params]
    for leaf in leaves:
        leaf.grad = torch.randn_like(leaf)
    optimizer = torch.optim.AdamW(leaves, lr=1e-6, weight_decay=0.01, fused=True)

    def torch_step() -> None:
        torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_zero_([leaf.grad for leaf in leaves])

    return [
        Row(
            f"clip, AdamW and reset, {total / 1e6:.0f} M fp32",
            ours,
            {"clip_grad_norm_, fused AdamW, zero": torch_step},
            bytes=total * 36.0,
            fraction=0.9,
            ratio=1.3,
        ),
        Row(
            f"AdamW step with the reset, {total / 1e6:.0f} M fp32",
            lambda: OPS.adamw_step_(
                params, grads, averages, squares, [], [], steps, lr=1e-6, weight_decay=0.01
            ),
            {"fused AdamW": optimizer.step},
            bytes=total * 32.0,
            fraction=0.9,
        ),
    ]


def weight_gradient_rows(largest: int) -> list[Row]:
    rows = []
    for tokens in (256, 2048, 16384):
        tokens = min(tokens, largest)
        weight, bias = torch.zeros(3072, 768, device=DEVICE), torch.zeros(3072, device=DEVICE)
        grads, inputs = _random([(tokens, 3072), (tokens, 768)], torch.bfloat16)

        def separate(
            w: Tensor = weight, b: Tensor = bias, g: Tensor = grads, x: Tensor = inputs
        ) -> None:
            w.add_(g.t() @ x)
            b.add_(g.sum(0))

        rows.append(
            Row(
                f"weight gradient 768 x 3072 bf16 into fp32, {tokens} tokens, with bias",
                lambda w=weight, b=bias, g=grads, x=inputs: OPS.linear_wgrad_(w, b, g, x),
                {"mm, sum, add_": separate},
                ratio=1.0,
            )
        )
    return rows


def embedding_rows(tokens: int) -> list[Row]:
    weight = torch.zeros(50304, 768, device=DEVICE)
    indices = torch.randint(50304, (tokens,), device=DEVICE)
    grads = torch.randn(tokens, 768, device=DEVICE).bfloat16()

    def separate() -> None:
        weight.add_(torch.ops.aten.embedding_dense_backward(grads, indices, 50304, -1, False))

    return [
        Row(
            f"embedding gradient 50304 x 768 bf16 into fp32, {tokens} tokens",
            lambda: OPS.embedding_wgrad_(weight, indices, grads),
            {"embedding_dense_backward, add_": separate},
            ratio=1.0,
        )
    ]


def run(row: Row, rounds: int) -> None:
    """Fills in the seconds."""
    candidates: dict[str, Call] = {"torch_ext": row.ours, **row.peers}
    candidates["torch_ext graph"] = captured(row.ours)
    with torch.no_grad():
        row.seconds = measure_in_turn(candidates, rounds)


def summary(row: Row, bandwidth: float) -> tuple[str, bool]:
    """A line of the table, and whether the row's figures are reached."""
    ours, graph = row.seconds["torch_ext"], row.seconds["torch_ext graph"]
    parts = [f"{row.name:66}{ours * 1e3:9.4f} ms, graph {graph * 1e3:.4f}"]
    reached = True
    if row.bytes:
        fraction = row.bytes / graph / bandwidth
        reached = row.fraction is None or fraction >= row.fraction
        parts.append(f"{fraction:4.0%} of bandwidth")
    best = min(row.seconds[name] for name in row.peers)
    for name in row.peers:
        parts.append(f"{name} {row.seconds[name] / ours:.2f}x")
    if row.ratio is not None:
        reached = reached and best / ours >= row.ratio
    return "  ".join(parts) + ("" if reached else "  missed"), reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--seconds", type=float, default=600.0, help="no row begins later")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    elements = 1_000_000 if options.quick else 100_000_000
    bandwidth = copy_bandwidth(0.1 if options.quick else 2.0)
    print(f"copy {bandwidth * 1e-9:.0f} GB/s")
    results = []
    left_out = []
    for make, size in (
        (accumulate_rows, elements),
        (norm_rows, elements),
        (step_rows, elements),
        (weight_gradient_rows, 512 if options.quick else 16384),
        (embedding_rows, 512 if options.quick else 16384),
    ):
        torch.manual_seed(0)
        if time.monotonic() > end:
            left_out.append(make.__name__.removesuffix("_rows"))
            continue
        for row in make(size):
            run(row, rounds=3 if options.quick else 7)
            text, reached = summary(row, bandwidth)
            print(text, flush=True)
            results.append(
                {
                    "name": row.name,
                    "seconds": row.seconds,
                    "bytes": row.bytes,
                    "fraction_target": row.fraction,
                    "ratio_target": row.ratio,
                    "reached": reached,
                }
            )
            if options.json is not None:  # after each, in case this is ended
                content = {"copy_bandwidth": bandwidth, "rows": results}
                options.json.write_text(json.dumps(content, indent=1) + "\n")
        torch.cuda.empty_cache()
    if left_out:
        print(f"no time was left for: {', '.join(left_out)}")
    print(f"{sum(bool(row['reached']) for row in results)} of {len(results)} figures reached")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
