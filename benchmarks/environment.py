"""What a result was measured on. Knows neither torch nor torch_ext: results outlive both."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings of all threads together; a bf16 peak of 0: no vdpbf16ps in use."""

    threads: int
    fma_gflops: float
    bf16_gflops: float
    read_gbytes: float

    def gflops(self, dtype: str) -> float:
        """The ceiling of a dtype: bf16 dot products where in use, fp32 multiply-adds otherwise."""
        if dtype == "bfloat16" and self.bf16_gflops > 0:
            return self.bf16_gflops
        return self.fma_gflops


@dataclass(frozen=True)
class Environment:
    """Everything a reader needs to judge the figures, or to repeat them."""

    processor: str
    capability: str
    threads: int
    date: str
    torch: str
    torch_ext: str
    python: str
    system: str
    peaks: Peaks | None

    @property
    def title(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, {self.capability}, torch {self.torch}, "
            f"torch_ext {self.torch_ext}, {self.date}"
        )

    @property
    def file_stem(self) -> str:
        """A name for result files: device, then date."""
        device = re.sub(r"[^a-z0-9]+", "-", self.processor.lower()).strip("-")
        return f"{device}_{self.capability}_{self.threads}-threads_{self.date}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Environment:
        peaks = content["peaks"]
        return cls(**(content | {"peaks": None if peaks is None else Peaks(**peaks)}))
