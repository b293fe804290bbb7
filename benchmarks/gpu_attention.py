"""Attention on one GPU against every way torch has: flash, efficient, cuDNN, math, FlexAttention.

python benchmarks/gpu_attention.py [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cuda_timing import captured, copy_bandwidth, measure_in_turn, product_rate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_ext

DEVICE = "cuda"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Case:
    """One call. ``peer`` and ``ratio``: how many times faster than whom it is to be."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    dtype: str = "bfloat16"
    tf32: bool = False  # fp32 products may be rounded to TF32
    causal: bool = False
    dropout: float = 0.0
    mask: str = ""  # "additive", "additive_learned", "half_padding"
    backward: bool = False
    flex: bool = False
    math: bool = False
    peer: str = "flash"
    ratio: float = 1.0
    bandwidth: float | None = None  # fraction of the copy bandwidth to reach
    graph: bool = False  # too short for Python: timed as the replay of a graph

    @property
    def flops(self) -> float:
        pairs = self.q_len * self.kv_len * (0.5 if self.causal else 1.0)
        products = 5 if self.backward else 2
        return 2.0 * products * self.batch * self.heads * pairs * self.dim

    @property
    def kv_bytes(self) -> float:
        return 2.0 * self.batch * self.kv_heads * self.kv_len * self.dim * 2


def cases(tokens: int = 16384) -> list[Case]:
    """2048 features in all, so that every length has the same projections."""
    found = []
    for dim in (64, 128):
        heads = 2048 // dim
        for length in (2048, 4096, 16384):
            length = min(length, tokens)
            for causal in (False, True):
                for backward in (False, True):
                    name = (
                        f"{'backward' if backward else 'forward'} D{dim} S{length}"
                        f"{' causal' if causal else ''}"
                    )
                    shape = (tokens // length, heads, heads, length, length, dim)
                    flex = length == 4096 and dim == 128 and causal  # seconds to compile
                    found.append(Case(name, *shape, causal=causal, backward=backward, flex=flex))
    half = max(1, tokens // 4)
    window = (half // 1024, 16, 16, 1024, 1024, 64)
    for backward in (False, True):
        way = "backward" if backward else "forward"
        found += [
            Case(
                f"{way} additive mask",
                *window,
                mask="additive",
                backward=backward,
                peer="efficient",
                ratio=1.5,
                math=True,
                flex=not backward,
            ),
            Case(
                f"{way} half padding",
                *window,
                mask="half_padding",
                backward=backward,
                peer="efficient",
                ratio=1.5,
            ),
            Case(f"{way} dropout 0.1", *window, dropout=0.1, backward=backward, ratio=1.0),
            Case(f"{way} fp32", *window, dtype="float32", backward=backward, peer="efficient"),
            Case(
                f"{way} fp32 as TF32",
                *window,
                dtype="float32",
                tf32=True,
                backward=backward,
                peer="efficient",
            ),
            Case(
                f"{way} GQA 32/8 causal D128",
                half // 2048 or 1,
                32,
                8,
                2048,
                2048,
                128,
                causal=True,
                backward=backward,
            ),
            Case(f"{way} D256", half // 2048 or 1, 8, 8, 2048, 2048, 256, backward=backward),
        ]
    found.append(
        Case(
            "backward additive mask, its gradient",
            *window,
            mask="additive_learned",
            backward=True,
            peer="math",
            ratio=1.5,
            math=True,
        )
    )
    found += [
        Case("decode 8192 keys", 16, 32, 32, 1, 8192, 128, bandwidth=0.8, graph=True),
        Case("decode GQA 32/8 8192 keys", 64, 32, 8, 1, 8192, 128, bandwidth=0.8, graph=True),
        Case(
            "decode one sequence, GQA 32/8, 65536 keys",
            1,
            32,
            8,
            1,
            65536,
            128,
            bandwidth=0.8,
            graph=True,
        ),
        Case("short: B256 H12 S128 D64", 256, 12, 12, 128, 128, 64, graph=True),
    ]
    return found


def small(case: Case) -> Case:
    """The same features at a size for trying things out."""
    changes = {"batch": 1, "q_len": min(case.q_len, 128), "kv_len": min(case.kv_len, 128)}
    return Case(**(asdict(case) | changes | {"flex": False}))


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    grad_out: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        mask = [self.mask] if self.mask is not None and self.mask.requires_grad else []
        return [self.query, self.key, self.value, *mask]


def make_inputs(case: Case) -> Inputs:
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    mask = None
    if case.mask.startswith("additive"):
        mask = random(1, case.heads, case.q_len, case.kv_len)
        mask.requires_grad_(case.mask == "additive_learned")
    elif case.mask == "half_padding":
        mask = torch.ones(case.batch, 1, 1, case.kv_len, dtype=torch.bool, device=DEVICE)
        mask[..., case.kv_len // 2 :] = False
    return Inputs(
        random(case.batch, case.heads, case.q_len, case.dim).requires_grad_(case.backward),
        random(case.batch, case.kv_heads, case.kv_len, case.dim).requires_grad_(case.backward),
        random(case.batch, case.kv_heads, case.kv_len, case.dim).requires_grad_(case.backward),
        mask,
        random(case.batch, case.heads, case.q_len, case.dim),
    )


def _attend(function: Callable[..., Tensor], case: Case, inputs: Inputs) -> Tensor:
    return function(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.mask,
        dropout_p=case.dropout,
        is_causal=case.causal,
        enable_gqa=case.heads != case.kv_heads,
    )


def _flex(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """FlexAttention with its mask made and its kernel compiled beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if case.causal:
        block_mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, case.q_len, case.kv_len, device=DEVICE
        )
    bias = inputs.mask

    def score_mod(score, b, h, q, k):  # type: ignore[no-untyped-def]
        return score + bias[0, h, q, k]

    return functools.partial(
        torch.compile(flex_attention, dynamic=False),
        inputs.query,
        inputs.key,
        inputs.value,
        score_mod=score_mod if bias is not None else None,
        block_mask=block_mask,
        enable_gqa=case.heads != case.kv_heads,
    )


def peers_of(case: Case, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Forward calls by name: ours first."""
    found = {
        "torch_ext": functools.partial(
            _attend, torch_ext.scaled_dot_product_attention, case, inputs
        )
    }
    for name, backend in BACKENDS.items():
        if name == "math" and not case.math:
            continue

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return _attend(F.scaled_dot_product_attention, case, inputs)

        found[name] = call
    if case.flex:
        found["flex"] = _flex(case, inputs)
    return found


def error_of(ours: Tensor, other: Tensor) -> float:
    """||ours - other|| / ||other||: two bf16 results differ by some 3e-3."""
    return float((ours.double() - other.double()).norm() / other.double().norm())


def run_case(case: Case, rounds: int) -> dict[str, object]:
    """Seconds of every candidate that takes the case, and how far apart the results are."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    inputs = make_inputs(case)
    timed: dict[str, Callable[[], object]] = {}
    results: dict[str, Tensor] = {}
    refused = {}
    for name, forward in peers_of(case, inputs).items():
        try:
            with contextlib.nullcontext() if case.backward else torch.no_grad():
                out = forward()
            results[name] = out.detach()
            if case.backward:
                grads = functools.partial(
                    torch.autograd.grad, out, inputs.leaves, inputs.grad_out, retain_graph=True
                )
                results[name] = grads()[0]
                timed[name] = grads
            else:
                forward = torch.no_grad()(forward)
                timed[name] = captured(forward) if case.graph else forward
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            refused[name] = (str(error).splitlines() or [type(error).__name__])[0][:120]
    seconds = measure_in_turn(timed, rounds)
    errors = {
        name: error_of(results["torch_ext"], result)
        for name, result in results.items()
        if name != "torch_ext" and "torch_ext" in results and case.dropout == 0
    }
    return {"case": asdict(case), "seconds": seconds, "errors": errors, "refused": refused}


def summary(case: Case, row: dict, bandwidth: float, peak: float) -> tuple[str, bool]:
    """A line of the table, and whether the case's figure is reached."""
    seconds = row["seconds"]
    ours = seconds.get("torch_ext")
    if ours is None:
        return f"{case.name:44} refused: {row['refused'].get('torch_ext')}", False
    parts = [f"{case.name:44}{ours * 1e3:9.3f} ms"]
    reached = True
    if case.bandwidth is not None:
        fraction = case.kv_bytes / ours / bandwidth
        reached = fraction >= case.bandwidth
        parts.append(f"{fraction:5.0%} of bandwidth")
    else:
        parts.append(f"{case.flops / ours * 1e-12:6.0f} TF/s {case.flops / ours / peak:4.0%}")
    for name, other in seconds.items():
        if name != "torch_ext":
            parts.append(f"{name} {other / ours:.2f}x")
    if case.bandwidth is None and case.peer in seconds:
        reached = seconds[case.peer] / ours >= case.ratio
    worst = max(row["errors"].values(), default=0.0)
    if worst > 2e-2:
        parts.append(f"DIFFERS by {worst:.1e}")
        reached = False
    return "  ".join(parts) + ("" if reached else "  missed"), reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins later")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    bandwidth, peak = copy_bandwidth(0.1 if options.quick else 2.0), product_rate()
    print(f"copy {bandwidth * 1e-9:.0f} GB/s, bf16 product {peak * 1e-12:.0f} TFLOP/s")
    rows: list[dict] = []
    left_out = []
    for case in cases():
        if options.only not in case.name:
            continue
        if time.monotonic() > end:
            left_out.append(case.name)
            continue
        case = small(case) if options.quick else case
        row = run_case(case, rounds=3 if options.quick else 7)
        text, row["reached"] = summary(case, row, bandwidth, peak)
        print(text, flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
        if options.json is not None:  # after each, in case this is ended
            content = {"copy_bandwidth": bandwidth, "product_rate": peak, "rows": rows}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    if left_out:
        print(f"no time was left for: {', '.join(left_out)}")
    print(f"{sum(bool(row['reached']) for row in rows)} of {len(rows)} figures reached")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
