"""Which calls the drop-in leaves to torch, and what last_attention_path() says of them."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cuda as backends
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_ext

SWITCHES = (
    backends.enable_flash_sdp,
    backends.enable_math_sdp,
    backends.enable_mem_efficient_sdp,
    backends.enable_cudnn_sdp,
)
FLASH, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
EFFICIENT, CUDNN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
LEFT_OUT = "torch: sdpa_kernel(...) leaves out a backend of this device"


@pytest.fixture(autouse=True)
def _off_and_all_backends_afterwards():
    yield
    torch_ext.disable()
    for switch in SWITCHES:
        switch(True)


def attention(query: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, query, query)


def path_of(query: torch.Tensor) -> str:
    attention(query)
    return torch_ext.last_attention_path()


def layer_path(layer: nn.MultiheadAttention, *inputs: torch.Tensor, **options) -> str:
    layer(*inputs, **options)
    return torch_ext.last_attention_path()


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_for_gpus_leave_the_cpu_on(switch):
    query = torch.randn(1, 2, 16, 8)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    torch_ext.enable()
    switch(False)
    assert path_of(query).startswith("cpu.")
    assert layer_path(layer, x, x, x, need_weights=False).startswith("cpu.")
    for other in SWITCHES:
        other(False)
    assert path_of(query).startswith("cpu.")


@pytest.mark.parametrize(
    "chosen",
    [[FLASH, MATH], [CUDNN, FLASH, EFFICIENT, MATH], list(SDPBackend.__members__.values())],
)
@pytest.mark.parametrize("set_priority", [True, False])
def test_lists_with_all_that_the_cpu_has_keep_it_on(chosen, set_priority):
    query = torch.randn(1, 2, 16, 8)
    with torch_ext.enabled(), sdpa_kernel(chosen, set_priority=set_priority):
        assert path_of(query).startswith("cpu.")


@pytest.mark.parametrize("chosen", [[FLASH], [MATH], [FLASH, EFFICIENT], [MATH, CUDNN]])
def test_lists_that_leave_out_a_backend_of_the_cpu_are_torchs(chosen):
    query = torch.randn(1, 2, 16, 8)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    with sdpa_kernel(chosen):
        stock = attention(query)
        with torch_ext.enabled():
            assert torch.equal(attention(query), stock)
            assert torch_ext.last_attention_path() == LEFT_OUT
            assert layer_path(layer, x, x, x, need_weights=False) == LEFT_OUT
            with sdpa_kernel([FLASH, MATH]):
                assert path_of(query).startswith("cpu.")
    with torch_ext.enabled():
        assert path_of(query).startswith("cpu.")


def test_lists_of_gpu_backends_fail_as_stock():
    query = torch.randn(1, 2, 16, 8)
    for on in (False, True):
        with torch_ext.enabled(on), sdpa_kernel(EFFICIENT), pytest.raises(RuntimeError):
            attention(query)


@pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")
def test_the_deprecated_context_and_a_switch_inside_a_list():
    query = torch.randn(1, 2, 16, 8)
    torch_ext.enable()
    with backends.sdp_kernel(enable_mem_efficient=False):
        assert path_of(query).startswith("cpu.")
        backends.enable_math_sdp(False)
        assert path_of(query) == LEFT_OUT
    with backends.sdp_kernel(enable_math=False):
        assert path_of(query) == LEFT_OUT
    assert path_of(query).startswith("cpu.")


def test_cuda_tensors_are_torchs_until_asked_for():
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key("torch_ext::attention_forward", "CUDA")

    def path_on_cuda() -> str:
        # torch asks the driver which of its kernels to take, once the call is left to it.
        with contextlib.suppress(RuntimeError):
            attention(query)
        return torch_ext.last_attention_path()

    with FakeTensorMode():
        query = torch.empty(1, 2, 16, 8, device="cuda")
        with torch_ext.enabled():
            assert path_on_cuda() == "torch: CUDA tensors need enable(cuda=True)"
        with torch_ext.enabled(cuda=True):
            assert (path_on_cuda() == "torch: no kernels for this device") is not kernels


def test_cuda_is_part_of_the_switch_and_of_its_scopes():
    def state() -> tuple[bool, bool]:
        return torch_ext.is_enabled(), torch_ext._C.is_cuda_enabled()

    assert state() == (False, False)
    torch_ext.enable(cuda=True)
    assert state() == (True, True)
    with torch_ext.enabled():
        assert state() == (True, False)
        with torch_ext.enabled(cuda=True):
            assert state() == (True, True)
        with torch_ext.enabled(False, cuda=True):
            assert state() == (False, False)
        assert state() == (True, False)
    assert state() == (True, True)
    torch_ext.enable()
    assert state() == (True, False)
    torch_ext.disable()
    assert state() == (False, False)


def test_the_path_of_layers_is_not_the_one_of_the_call_before():
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    torch_ext.enable()
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            assert layer_path(layer, x, x, x, need_weights=False).startswith("cpu.")
            weights = layer_path(layer, x, x, x)
            assert weights == "torch: weights asked for (need_weights=True)"
            assert layer_path(layer, x, x.clone(), x, need_weights=False).startswith("cpu.")


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_the_path_of_nested_tensors(layout):
    sequences = [torch.randn(length, 2, 8) for length in (3, 5)]
    with torch_ext.enabled():
        dense = torch.randn(1, 2, 16, 8)
        assert path_of(dense).startswith("cpu.")
        if layout is torch.jagged:
            nested = torch.nested.nested_tensor(sequences, layout=layout).transpose(1, 2)
        else:
            nested = torch.nested.nested_tensor([s.transpose(0, 1) for s in sequences])
        assert path_of(nested).startswith("torch: a tensor is nested")
        assert path_of(dense).startswith("cpu.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(nested)


def test_python_m_torch_ext_says_what_is_on():
    from torch_ext import __main__ as report

    def drop_in() -> str:
        return dict(report._lines(report.report()))["drop-in"]

    assert drop_in().startswith("not enabled")
    with torch_ext.enabled():
        assert drop_in() == "enabled; CUDA tensors are left to torch"
    with torch_ext.enabled(cuda=True):
        assert drop_in() == "enabled, for CUDA tensors too"
