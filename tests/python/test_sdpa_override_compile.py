"""The drop-in under torch.compile: each state runs its own code, and each is compiled once."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_ext

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_off_afterwards")


@pytest.fixture
def _off_afterwards():
    yield
    torch_ext.disable()


NOTHING = "cpu.empty"


def ran_fused() -> bool:
    """Whether torch_ext's kernels have run since this was last asked."""
    path = torch_ext.last_attention_path()
    torch_ext.scaled_dot_product_attention(*(torch.zeros(1, 1, 0, 8),) * 3)
    assert torch_ext.last_attention_path() == NOTHING
    return path.startswith("cpu.") and path != NOTHING


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True) * 2


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 3, 16, 8, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("first", [False, True])
def test_code_follows_the_switch_and_both_versions_stay_cached(first):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    inputs = qkv()
    expected = attention(*inputs)
    ran_fused()
    for round_ in range(3):
        for on in (first, not first):
            with torch_ext.enabled(on):
                out = compiled(*inputs)
                assert ran_fused() is on
                assert_same_but_for_rounding(out, expected)
        assert counter.frame_count == 2, f"compiled anew in round {round_}"


def test_cuda_is_a_state_of_its_own():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attention, backend=counter)
    inputs = qkv()
    for _ in range(2):
        for on, cuda in ((True, False), (True, True), (False, False), (False, True)):
            with torch_ext.enabled(on, cuda=cuda):
                compiled(*inputs)
                tag = torch.compiler.config.cache_key_tag
                assert tag == (
                    ("torch_ext_cuda.2" if cuda else "torch_ext.2") if on else "torch_ext_off.2"
                )
    assert counter.frame_count == 3
    assert torch.compiler.config.cache_key_tag == "torch_ext_off.2"


def test_methods_nested_functions_and_graph_breaks_follow_too():
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            first = attention(*inputs)
            torch._dynamo.graph_break()
            return attention(first, *inputs[1:])

    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager")
    inputs = qkv()
    expected = layer(*inputs)
    ran_fused()
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            assert_same_but_for_rounding(compiled(*inputs), expected)
            assert ran_fused() is on


def test_code_compiled_in_isolation_follows_too():
    inputs = qkv()
    # Newer releases of torch only; in others it is one more compiled function.
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options = {"isolate_recompiles": True} if isolated else {}
    compiled = torch.compile(attention, backend="aot_eager", **options)
    ran_fused()
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            compiled(*inputs)
            assert ran_fused() is on


@pytest.mark.parametrize("mode", ["train", "no_grad", "inference_mode"])
def test_every_mode_compiles_fused(mode):
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    guard = {
        "train": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[mode]
    with guard():
        inputs = qkv(grad=mode == "train")
        for on in (False, True, False):
            expected = attention(*inputs)
            ran_fused()
            with torch_ext.enabled(on):
                out = compiled(*inputs)
            assert ran_fused() is on
            assert_same_but_for_rounding(out, expected)
            if mode == "train":
                grad_out = torch.randn_like(out)
                assert_same_but_for_rounding(
                    torch.autograd.grad(out, inputs, grad_out),
                    torch.autograd.grad(expected, inputs, grad_out),
                )


def test_inductor_and_its_caches_keep_the_states_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = qkv(grad=True)
    expected = attention(*inputs)

    def run(on: bool) -> None:
        torch._dynamo.reset()  # only the caches on disk remain
        compiled = torch.compile(attention, fullgraph=True)
        ran_fused()
        out = compiled(*inputs)
        assert ran_fused() is on
        assert_same_but_for_rounding(out, expected)
        out.sum().backward()  # a training graph is stored once its backward pass is compiled

    counters = torch._dynamo.utils.counters["aot_autograd"]
    before = counters["autograd_cache_hit"]
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            run(on)
    assert counters["autograd_cache_hit"] == before + 2
    # Options of torch.compile set in one thread do not count in another.
    failures: list[BaseException] = []

    def in_thread() -> None:
        try:
            run(True)
        except BaseException as error:  # reported by the main thread
            failures.append(error)

    with torch_ext.enabled():
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    assert not failures


def test_the_cache_key_names_the_state_and_keeps_what_the_user_chose():
    config = torch.compiler.config
    assert config.cache_key_tag == "torch_ext_off.2"
    with torch_ext.enabled():
        assert config.cache_key_tag == "torch_ext.2"
        with torch_ext.enabled(False):
            assert config.cache_key_tag == "torch_ext_off.2"
    assert config.cache_key_tag == "torch_ext_off.2"
    with config.patch(cache_key_tag="mine"):
        with torch_ext.enabled():
            assert config.cache_key_tag == "mine+torch_ext.2"
        assert config.cache_key_tag == "mine+torch_ext_off.2"
    assert config.cache_key_tag == "torch_ext_off.2"


def test_graphs_that_call_an_operator_are_not_taken_from_an_older_library(tmp_path, monkeypatch):
    """Inductor checks the strides of what it calls against those of the library that it compiled
    for; its key has a graph's text alone, which is the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = qkv()

    def direct(*operands: Tensor) -> Tensor:
        return torch.ops.torch_ext.scaled_dot_product_attention(*operands)

    def hits(mark: str | None) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.compiler.config.patch(**({} if mark is None else {"cache_key_tag": mark})):
            torch.compile(direct, fullgraph=True)(*inputs)
        counters = torch._dynamo.utils.counters
        return (
            counters["inductor"]["fxgraph_cache_hit"]
            + counters["aot_autograd"]["autograd_cache_hit"]
        )

    assert hits("") == 0  # as 0.1.0 compiled it
    assert hits(None) == 0
    assert hits(None) > 0


def test_sdpa_kernel_inside_compiled_code_keeps_torchs_backend():
    def chosen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value)

    inputs = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*inputs)
    with torch_ext.enabled():
        compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), expected)
        assert not ran_fused()


def test_is_enabled_is_a_constant_that_follows():
    def doubled(x: Tensor) -> Tensor:
        return x * 2 if torch_ext.is_enabled() else x

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    x = torch.ones(3)
    for on in (False, True, False, True):
        with torch_ext.enabled(on):
            assert torch.equal(compiled(x), x * (1 + on))


def test_switching_inside_a_graph_is_refused_and_otherwise_breaks_it():
    def switching(x: Tensor) -> Tensor:
        with torch_ext.enabled():
            return attention(x, x, x)

    x = torch.randn(1, 1, 8, 8)
    expected = attention(x, x, x)
    ran_fused()
    assert_same_but_for_rounding(torch.compile(switching, backend="aot_eager")(x), expected)
    assert ran_fused()
    assert not torch_ext.is_enabled()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="outside compiled code"):
        torch.compile(switching, backend="aot_eager", fullgraph=True)(x)
    assert not torch_ext.is_enabled()
