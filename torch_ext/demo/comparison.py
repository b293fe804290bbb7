"""What the demo compares: pairs of training runs that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Loop = Literal["one batch", "stock micro-batches", "accumulated micro-batches"]


@dataclass(frozen=True)
class Variant:
    """One way of training the same model on the same batches.

    Attributes:
        name: identifier in the JSON results.
        title: column heading.
        fused_attention: whether the run happens under ``torch_ext.enable()``.
        loop: what each step does with its batch.
    """

    name: str
    title: str
    fused_attention: bool
    loop: Loop = "one batch"


@dataclass(frozen=True)
class Comparison:
    """Two variants whose loss curves must agree, the baseline first.

    Attributes:
        part_of_steps: how many of the steps that were asked for it takes.
    """

    name: str
    title: str
    baseline: Variant
    candidate: Variant
    part_of_steps: float = 1.0

    @property
    def variants(self) -> tuple[Variant, Variant]:
        return (self.baseline, self.candidate)

    def steps(self, steps: int) -> int:
        """Of so many steps those that this comparison takes."""
        return max(1, round(steps * self.part_of_steps))


ATTENTION = Comparison(
    name="attention",
    title="Fused attention: the same training loop under torch_ext.enable()",
    baseline=Variant("stock", "stock PyTorch", fused_attention=False),
    candidate=Variant("torch_ext", "torch_ext", fused_attention=True),
)

MICRO_BATCHES = Comparison(
    name="micro_batches",
    title="Micro-batches: a stock accumulation loop against torch_ext.GradientAccumulator, both "
    "with fused attention",
    baseline=Variant("stock_loop", "stock loop", fused_attention=True, loop="stock micro-batches"),
    candidate=Variant(
        "accumulator",
        "GradientAccumulator",
        fused_attention=True,
        loop="accumulated micro-batches",
    ),
    # Its curves agree or not within a few steps.
    part_of_steps=0.25,
)

COMPARISONS = (ATTENTION, MICRO_BATCHES)


def find_variant(name: str) -> Variant:
    """The variant of that name; raises KeyError when there is none."""
    for comparison in COMPARISONS:
        for variant in comparison.variants:
            if variant.name == name:
                return variant
    raise KeyError(name)
