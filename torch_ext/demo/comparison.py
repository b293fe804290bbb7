"""What the demo compares: pairs of training runs that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way of training the same model on the same batches.

    Attributes:
        name: identifier in the JSON results.
        title: column heading.
        fused_attention: whether the run happens under ``torch_ext.enable()``.
    """

    name: str
    title: str
    fused_attention: bool


@dataclass(frozen=True)
class Comparison:
    """Two variants whose loss curves must agree, the baseline first."""

    name: str
    title: str
    baseline: Variant
    candidate: Variant

    @property
    def variants(self) -> tuple[Variant, Variant]:
        return (self.baseline, self.candidate)


ATTENTION = Comparison(
    name="attention",
    title="Fused attention: the same training loop under torch_ext.enable()",
    baseline=Variant("stock", "stock PyTorch", fused_attention=False),
    candidate=Variant("torch_ext", "torch_ext", fused_attention=True),
)

COMPARISONS = (ATTENTION,)


def find_variant(name: str) -> Variant:
    """The variant of that name; raises KeyError when there is none."""
    for comparison in COMPARISONS:
        for variant in comparison.variants:
            if variant.name == name:
                return variant
    raise KeyError(name)
