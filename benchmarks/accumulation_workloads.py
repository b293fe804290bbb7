"""What bench_gradient_accumulation.py measures, as data: one entry a workload, with its figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "accumulate",
    "norm",
    "clip_step",
    "step",
    "weight_gradient",
    "embedding_gradient",
    "mlp_window",
    "parallel_window",
]
Shapes = tuple[tuple[int, ...], ...]
OURS = "torch_ext"  # among the names of the ways to do it
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Workload:
    """One call on a list of tensors, or on as many layers as ``shapes`` has weights.

    Attributes:
        name: unique; what ``--only`` matches.
        kind: which calls do it: a key of accumulation_calls.CALLS.
        dtype: of the gradients; what they go into is float32.
        shapes: of the parameters.
        tokens: rows that a weight gradient sums over; of one micro-batch.
        optimizer: "AdamW" or "SGD".
        bytes_per_element: read and written at least, for each element of a parameter.
        ratio: the fastest of torch's ways over ours, at least; None: no figure was set.
        bandwidth_fraction: of the measured memory bandwidth, at least.
    """

    name: str
    kind: Kind
    dtype: str
    shapes: Shapes
    group: Literal["target", "extra"] = "target"
    tokens: int = 0
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    bytes_per_element: float = 0.0
    ratio: float | None = None
    bandwidth_fraction: float | None = None

    @property
    def elements(self) -> int:
        total = 0
        for shape in self.shapes:
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    @property
    def bytes(self) -> float:
        """Read and written at least; 0 for training windows, which compute."""
        if self.kind in ("mlp_window", "parallel_window"):
            return 0.0
        gradient = _BYTES[self.dtype]
        if self.kind == "embedding_gradient":  # the rows that tokens name
            return self.tokens * self.shapes[0][1] * (gradient + 8.0)
        rows = self.tokens * sum(map(sum, self.shapes)) * gradient
        return self.elements * self.bytes_per_element + rows

    def shrunk(self) -> Workload:
        """The same kind of call in a hundredth of the time, to see that everything runs."""
        shapes = tuple(tuple(min(size, 40) for size in shape) for shape in self.shapes[:14])
        return dataclasses.replace(
            self,
            shapes=shapes,
            tokens=min(self.tokens, 20),
            ratio=None,
            bandwidth_fraction=None,
        )


def transformer_shapes(layers: int, width: int) -> Shapes:
    """The 12 parameters of each layer: projections and norms with their biases."""
    w = width
    attention = ((3 * w, w), (3 * w,), (w, w), (w,))
    feed_forward = ((4 * w, w), (4 * w,), (w, 4 * w), (w,))
    return (*attention, *feed_forward, *((w,),) * 4) * layers


MODEL = transformer_shapes(layers=8, width=768)  # 57 M parameters in 96 tensors
SMALL = ((64,),) * 2000
# Weights of several layers, as a backward pass meets them: none is in the caches any more.
LAYERS = ((3072, 768),) * 8
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _accumulate(dtype: str) -> Workload:
    return Workload(
        name=f"accumulate 57 M in 96 tensors, {SHORT[dtype]} into fp32",
        kind="accumulate",
        dtype=dtype,
        shapes=MODEL,
        bytes_per_element=8 + _BYTES[dtype],
        ratio=1.0,
        bandwidth_fraction=0.9,
    )


def _small(dtype: str, ratio: float) -> Workload:
    return Workload(
        name=f"accumulate 2000 tensors of 64, {SHORT[dtype]} into fp32",
        kind="accumulate",
        dtype=dtype,
        shapes=SMALL,
        bytes_per_element=8 + _BYTES[dtype],
        ratio=ratio,
    )


def _weight_gradient(dtype: str, tokens: int, ratio: float | None) -> Workload:
    return Workload(
        name=f"weight gradient 768 x 3072, {tokens} tokens, {SHORT[dtype]} into fp32",
        kind="weight_gradient",
        dtype=dtype,
        shapes=LAYERS,
        group="target" if ratio is not None else "extra",
        tokens=tokens,
        bytes_per_element=8,
        ratio=ratio,
    )


def _mlp_window(dtype: str, tokens: int, ratio: float) -> Workload:
    autocast = "" if dtype == "float32" else " autocast"
    return Workload(
        name=f"window of 4 x {tokens} tokens, 4 MLP blocks, {SHORT[dtype]}{autocast}",
        kind="mlp_window",
        dtype=dtype,
        shapes=((3072, 768), (768, 3072)) * 4,
        tokens=tokens,
        ratio=ratio,
    )


WORKLOADS: tuple[Workload, ...] = (
    *(_accumulate(dtype) for dtype in ("bfloat16", "float16", "float32")),
    _small("float32", 1.5),
    _small("bfloat16", 3.0),
    Workload(
        name="norm and inf check, 57 M fp32",
        kind="norm",
        dtype="float32",
        shapes=MODEL,
        bytes_per_element=4,
        ratio=2.5,
    ),
    Workload(
        name="clip + AdamW + reset, 57 M fp32",
        kind="clip_step",
        dtype="float32",
        shapes=MODEL,
        bytes_per_element=4 + 32,
        ratio=1.3,
    ),
    *(_weight_gradient("bfloat16", t, ratio) for t, ratio in ((256, 1.1), (64, 1.3), (16, 1.6))),
    _mlp_window("float32", 16, 1.15),
    _mlp_window("bfloat16", 16, 1.3),
    _mlp_window("float32", 64, 1.05),
    _mlp_window("bfloat16", 64, 1.2),
    Workload(
        name="window of 4 x 512 tokens, 2-layer transformer, 2 workers",
        kind="parallel_window",
        dtype="float32",
        shapes=((256, 64),) * 2,
        tokens=512,
        ratio=1.5,
    ),
    *(_weight_gradient("float32", tokens, None) for tokens in (256, 64, 16)),
    Workload(
        name="embedding gradient 50304 x 768, 4096 tokens, bf16 into fp32",
        kind="embedding_gradient",
        dtype="bfloat16",
        shapes=((50304, 768),),
        group="extra",
        tokens=4096,
    ),
    Workload(
        name="AdamW + reset, 57 M fp32",
        kind="step",
        dtype="float32",
        shapes=MODEL,
        group="extra",
        bytes_per_element=32,
    ),
    Workload(
        name="AdamW + reset, 2000 tensors of 64, fp32",
        kind="step",
        dtype="float32",
        shapes=SMALL,
        group="extra",
        bytes_per_element=32,
    ),
    Workload(
        name="SGD with momentum + reset, 57 M fp32",
        kind="step",
        dtype="float32",
        shapes=MODEL,
        group="extra",
        optimizer="SGD",
        bytes_per_element=24,
    ),
)


def select(words: str | None = None, groups: tuple[str, ...] = ("target",)) -> list[Workload]:
    """The workloads of these groups whose names have all the words, in any case."""
    wanted = (words or "").lower().split()
    return [
        w for w in WORKLOADS if w.group in groups and all(word in w.name.lower() for word in wanted)
    ]
