"""Fixtures of the operator tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch

import torch_ext

# Graphs that Inductor kept of an older build expect that build's strides.
_inductor_cache = tempfile.TemporaryDirectory(prefix="torch_ext-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name

_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def supported_capabilities() -> tuple[str, ...]:
    """The instruction sets that this CPU can be limited to, least first."""
    best = torch_ext._C.supported_cpu_capability()
    return _CAPABILITIES[: _CAPABILITIES.index(best) + 1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20240607)


def _process_state() -> dict[str, object]:
    return {
        "drop-in": torch_ext.is_enabled(),
        "instruction set": torch_ext._C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """What one test sets, the next one does not see: tests pass alone and in any order."""
    before = _process_state()
    yield
    assert _process_state() == before


def devices() -> tuple[str, ...]:
    """The devices whose kernels this build and this machine have."""
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("torch_ext::grad_stats", "CUDA")
    return ("cpu", "cuda") if has_kernels and torch.cuda.is_available() else ("cpu",)


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each device; where there is no GPU, nothing of it is there to skip.

    Tensors that the test makes without naming a device are on this one. A test of the CPU alone in
    a module that uses the fixture: ``@pytest.mark.parametrize("device", ["cpu"], indirect=True)``.
    """
    if request.param == "cpu":
        yield "cpu"
        return
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=supported_capabilities())
def cpu_capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each instruction set that this CPU has."""
    before = torch_ext._C.cpu_capability()
    torch_ext._C.set_cpu_capability(request.param)
    yield request.param
    torch_ext._C.set_cpu_capability(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile with nothing compiled before, and nothing left behind."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
