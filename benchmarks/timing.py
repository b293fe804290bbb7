"""Timing that survives a busy machine: one process, candidates in turn, ratios pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Above this spread of the pairwise ratios, the middle half over the median, a row is marked noisy.
NOISY_SPREAD = 0.1
_MIN_SAMPLE_SECONDS = 5e-3  # shorter calls are repeated within one sample


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        seconds: time for one candidate of one workload, about.
        min_samples, max_samples: bounds of the number of rounds.
        warm_up: calls of each candidate before anything counts.
    """

    seconds: float = 1.5
    min_samples: int = 7
    max_samples: int = 60
    warm_up: int = 2


QUICK = Plan(seconds=0.02, min_samples=3, max_samples=3, warm_up=1)


@dataclass(frozen=True)
class Measurement:
    """Seconds a call, one for each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: the median over the rounds' own ratios."""

    median: float
    spread: float

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY_SPREAD


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def measure(
    candidates: Mapping[str, Callable[[], object]],
    plan: Plan,
    device: torch.device,
) -> dict[str, Measurement]:
    """Times the candidates A B C, A B C, ... in rounds.

    A disturbance then meets all of them, and leaves the ratios of the other rounds alone. Every
    second round runs in the reverse order, so that nobody always follows the same neighbour.
    """
    repeats: dict[str, int] = {}
    longest = 0.0
    for name, call in candidates.items():
        for _ in range(plan.warm_up):
            call()
        once = _sample(call, 1, device)
        repeats[name] = max(1, round(_MIN_SAMPLE_SECONDS / max(once, 1e-7)))
        if plan is QUICK:
            repeats[name] = 1
        longest = max(longest, once * repeats[name])
    rounds = round(plan.seconds / max(longest, 1e-7))
    rounds = min(max(rounds, plan.min_samples), plan.max_samples)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for round_index in range(rounds):
        for name in order if round_index % 2 == 0 else reversed(order):
            seconds[name].append(_sample(candidates[name], repeats[name], device))
    return {name: Measurement(values) for name, values in seconds.items()}


def ratio(baseline: Measurement, candidate: Measurement) -> Ratio:
    """Baseline's time over the candidate's, round by round."""
    ratios = [a / b for a, b in zip(baseline.seconds, candidate.seconds, strict=True)]
    median = statistics.median(ratios)
    if len(ratios) < 4:
        return Ratio(median, (max(ratios) - min(ratios)) / median)
    low, _, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, (high - low) / median)
