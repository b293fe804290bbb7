"""The drop-in switch: what it catches, what it leaves alone, and that it leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn

import torch_ext

KEYS = ("CPU", "AutogradCPU", "NestedTensorCPU", "CUDA", "AutogradCUDA", "NestedTensorCUDA")
OPERATORS = ("aten::scaled_dot_product_attention", "aten::_native_multi_head_attention")


@pytest.fixture(autouse=True)
def _off_afterwards():
    assert not torch_ext.is_enabled()
    yield
    torch_ext.disable()


def qkv(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


def attention_path(*arguments, **options) -> str:
    F.scaled_dot_product_attention(*arguments, **options)
    return torch_ext.last_attention_path()


def ran_fused() -> bool:
    return torch_ext.last_attention_path().startswith("cpu.")


def dispatcher_state() -> list[str]:
    return [torch._C._dispatch_dump(name) for name in OPERATORS]


def test_the_switch_nests_and_restores():
    assert not torch_ext.is_enabled()
    with torch_ext.enabled():
        assert torch_ext.is_enabled()
        with torch_ext.enabled(False):
            assert not torch_ext.is_enabled()
            with torch_ext.enabled():
                assert torch_ext.is_enabled()
            assert not torch_ext.is_enabled()
        assert torch_ext.is_enabled()
    assert not torch_ext.is_enabled()

    torch_ext.enable()
    torch_ext.enable()
    with torch_ext.enabled(False):
        assert not torch_ext.is_enabled()
        torch_ext.enable()  # this scope's
        assert torch_ext.is_enabled()
    assert torch_ext.is_enabled()
    torch_ext.disable()
    assert not torch_ext.is_enabled()
    torch_ext.disable()


def test_a_scope_ends_with_an_exception_and_decorates():
    with pytest.raises(KeyError), torch_ext.enabled():
        raise KeyError
    assert not torch_ext.is_enabled()

    @torch_ext.enabled()
    def depth(n: int) -> int:
        assert torch_ext.is_enabled()
        return n if n == 0 else depth(n - 1)

    assert depth(3) == 0
    assert not torch_ext.is_enabled()
    scope = torch_ext.enabled()
    with scope, scope:
        assert torch_ext.is_enabled()
    assert not torch_ext.is_enabled()


def test_disable_leaves_dispatcher_and_classes_as_they_were():
    before = dispatcher_state(), dict(vars(nn.MultiheadAttention))
    with torch_ext.enabled():
        assert dispatcher_state() != before[0]
        assert nn.MultiheadAttention.forward is not before[1]["forward"]
    assert dispatcher_state() == before[0]
    assert dict(vars(nn.MultiheadAttention)) == before[1]


def test_import_patches_nothing_and_switching_warns_of_nothing():
    program = f"""
import sys, torch
state = lambda: [torch._C._dispatch_dump(name) for name in {OPERATORS!r}]
before = state(), torch.nn.MultiheadAttention.forward
import torch_ext
assert (state(), torch.nn.MultiheadAttention.forward) == before
assert "torch._dynamo" not in sys.modules
assert "torch.utils.flop_counter" not in sys.modules
finders = list(sys.meta_path)
for _ in range(2):
    torch_ext.enable()
    torch_ext.disable()
assert (state(), torch.nn.MultiheadAttention.forward) == before
assert sys.meta_path == finders
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_every_mode_and_dtype_runs_fused_and_equals_stock(dtype, mode):
    guard = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }[mode]
    with guard():
        inputs = qkv(2, 3, 37, 16, dtype=dtype, grad=mode == "grad")
        stock = F.scaled_dot_product_attention(*inputs, is_causal=True)
        with torch_ext.enabled():
            ours = F.scaled_dot_product_attention(*inputs, is_causal=True)
            assert ran_fused()
    assert ours.requires_grad == stock.requires_grad
    assert_same_but_for_rounding(ours, stock)
    if mode == "grad":
        grad_out = torch.randn_like(stock)
        expected = torch.autograd.grad(stock, inputs, grad_out)
        assert_same_but_for_rounding(torch.autograd.grad(ours, inputs, grad_out), expected)


def test_masks_gqa_dropout_and_shapes_run_fused():
    query = torch.randn(2, 6, 9, 16)
    key, value = torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 8)
    boolean = torch.rand(2, 1, 9, 11) > 0.3
    boolean[..., 0] = True
    for options in (
        {},
        {"attn_mask": boolean},
        {"attn_mask": torch.randn(9, 11)},
        {"is_causal": True},
        {"scale": 0.25},
    ):
        stock = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        with torch_ext.enabled():
            ours = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
            assert ran_fused()
        assert_same_but_for_rounding(ours, stock)
    with torch_ext.enabled():
        out = F.scaled_dot_product_attention(*qkv(2, 3, 64, 16), dropout_p=0.5)
        assert ran_fused()
        assert torch.isfinite(out).all()
        for shape in ((5, 8), (3, 5, 8), (2, 2, 3, 5, 8), (0, 3, 5, 8), (2, 3, 0, 8)):
            inputs = qkv(*shape)
            ours = F.scaled_dot_product_attention(*inputs)
            with torch_ext.enabled(False):
                assert_same_but_for_rounding(ours, F.scaled_dot_product_attention(*inputs))


def test_autocast_runs_fused_in_the_lower_precision():
    inputs = qkv(2, 3, 16, 16, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.scaled_dot_product_attention(*inputs)
        with torch_ext.enabled():
            ours = F.scaled_dot_product_attention(*inputs)
            assert ran_fused()
    assert ours.dtype == stock.dtype == torch.bfloat16
    assert_same_but_for_rounding(ours, stock)
    (grad,) = torch.autograd.grad(ours.float().square().sum(), inputs[0])
    assert grad.dtype == torch.float32


def test_torch_func_transforms():
    inputs = qkv(4, 2, 9, 8)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).square().sum()

    transforms = {
        "grad": torch.func.grad(loss, argnums=(0, 1, 2)),
        "vmap": torch.func.vmap(F.scaled_dot_product_attention),
        "vmap of grad": torch.func.vmap(torch.func.grad(loss)),
    }
    for transform in transforms.values():
        stock = transform(*inputs)
        with torch_ext.enabled():
            assert_same_but_for_rounding(transform(*inputs), stock)


def test_nested_and_meta_tensors_keep_torchs_kernels():
    sequences = [torch.randn(2, length, 8) for length in (3, 5)]
    nested = torch.nested.nested_tensor(sequences)
    stock = F.scaled_dot_product_attention(nested, nested, nested)
    with torch_ext.enabled():
        ours = F.scaled_dot_product_attention(nested, nested, nested)
        on_meta = F.scaled_dot_product_attention(*(t.to("meta") for t in qkv(1, 2, 4, 8)))
    for a, b in zip(ours.unbind(), stock.unbind(), strict=True):
        assert_same_but_for_rounding(a, b)
    assert on_meta.shape == (1, 2, 4, 8)


def test_errors_stay_runtime_errors():
    query, key, value = qkv(1, 2, 4, 8)
    with torch_ext.enabled():
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, key.double(), value)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, key[..., :4], value)
        with pytest.raises(RuntimeError, match="is_causal"):
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True
            )


def test_threads_may_switch_while_others_compute():
    inputs = qkv(1, 2, 33, 16)
    expected = F.scaled_dot_product_attention(*inputs)
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as error:  # reported by the main thread
                failures.append(error)

        return threading.Thread(target=run)

    def compute() -> None:
        while not done.is_set():
            out = F.scaled_dot_product_attention(*inputs)
            assert_same_but_for_rounding(out, expected)

    def switch() -> None:
        for _ in range(100):
            with torch_ext.enabled():
                assert torch_ext.is_enabled()

    computing = [guarded(compute) for _ in range(2)]
    switching = [guarded(switch) for _ in range(3)]
    for thread in computing + switching:
        thread.start()
    for thread in switching:
        thread.join()
    done.set()
    for thread in computing:
        thread.join()
    assert not failures
    assert not torch_ext.is_enabled()


def test_the_switch_holds_in_other_threads():
    seen: list[bool] = []
    with torch_ext.enabled():
        thread = threading.Thread(target=lambda: seen.append(torch_ext.is_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_no_warning_in_process_either():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch_ext.enabled():
            F.scaled_dot_product_attention(*qkv(1, 1, 4, 8))
