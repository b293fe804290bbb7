"""Times on the GPU: events around many calls, candidates in turn, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

# A sample is as many calls as take about this long: the events' own half microsecond vanishes.
_SAMPLE_SECONDS = 4e-3
_MAX_CALLS = 200
_WARM_UP = 3


def _sample(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def measure_in_turn(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 7
) -> dict[str, float]:
    """Median seconds a call, by name. Rounds go A B C, C B A, ...: nobody has a fixed neighbour.

    What is timed is what a caller waits for: where launching takes longer than running, launching.
    """
    calls = {}
    for name, call in candidates.items():
        for _ in range(_WARM_UP):
            call()
        torch.cuda.synchronize()
        once = _sample(call, 2)
        calls[name] = max(1, min(_MAX_CALLS, round(_SAMPLE_SECONDS / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        names = list(candidates)
        for name in names if index % 2 == 0 else reversed(names):
            seconds[name].append(_sample(candidates[name], calls[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The same work as the replay of a CUDA graph: what is left of the launching is the device's.

    Capturing fails where the call waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(gbytes: float = 2.0) -> float:
    """Bytes read and written a second by a large copy: the ceiling of what streams memory."""
    source = torch.empty(int(gbytes * 1e9 / 4), dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    seconds = measure_in_turn({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() * source.element_size() / seconds


def product_rate(size: int = 8192) -> float:
    """Operations a second of a bf16 matrix product on random numbers: zeros run faster."""
    a = torch.randn(size, size, device="cuda").bfloat16()
    b = torch.randn(size, size, device="cuda").bfloat16()
    seconds = measure_in_turn({"mm": lambda: a @ b})["mm"]
    return 2 * size**3 / seconds
