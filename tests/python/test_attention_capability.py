"""Every instruction set that this CPU has, forced one by one, and the path that a call took."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import DTYPES, AttentionCase, check_case
from rounding_bounds import assert_same_but_for_rounding

import torch_ext

CASES = [
    AttentionCase((2, 3, 37, 24), (2, 3, 70, 24)),
    AttentionCase((1, 2, 70, 80), (1, 2, 150, 80), (1, 2, 150, 33), mask=(2, 1, 150)),
    AttentionCase((1, 4, 65, 17), (1, 2, 65, 17), is_causal=True, enable_gqa=True),
    AttentionCase((2, 3, 1, 64), (2, 3, 130, 64), padding=(2, 130)),
    AttentionCase((1, 2, 33, 16), (1, 2, 90, 16), mask=(33, 90), mask_dtype=torch.bool),
    AttentionCase((1, 2, 33, 16), (1, 2, 90, 16), mask=(1, 2, 33, 1)),
    AttentionCase((1, 1, 5, 256), (1, 1, 300, 256)),
    AttentionCase((3, 1), (5, 1), scale=-2.0),
    AttentionCase((1, 4, 33, 16), (3, 4, 35, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numerics(cpu_capability: str, case: AttentionCase, dtype: torch.dtype) -> None:
    check_case(case, dtype)
    assert torch_ext.last_attention_path().startswith(f"cpu.{cpu_capability}.")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_dropout_mask_is_the_same_everywhere(cpu_capability: str, dropout_p: float) -> None:
    query, key, value = (torch.randn(2, 3, n, 24, dtype=torch.float64) for n in (37, 70, 70))
    seed = torch.tensor([99])
    out, _ = torch.ops.torch_ext.attention_forward(
        query, key, value, dropout_p=dropout_p, dropout_seed=seed
    )
    from attention_reference import attention

    keep = torch.ops.torch_ext.attention_dropout_mask(seed, dropout_p, (2, 3, 37, 70))
    expected, _ = attention(query, key, value, dropout_p=dropout_p, keep=keep)
    assert_same_but_for_rounding(out, expected)


def test_self_attention(cpu_capability: str) -> None:
    module = torch.nn.MultiheadAttention(48, 3, batch_first=True)
    x = torch.randn(2, 37, 48)
    out = torch_ext.self_attention(
        x,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
        3,
    )
    assert_same_but_for_rounding(out, module(x, x, x, need_weights=False)[0])


def test_same_bits_for_every_thread_count(cpu_capability: str, set_num_threads) -> None:  # type: ignore[no-untyped-def]
    tensors = AttentionCase((1, 2, 150, 32), (1, 2, 210, 32), mask=(2, 1, 210)).tensors(
        torch.float32
    )
    results = []
    for threads in (1, 3):
        set_num_threads(threads)
        out = torch_ext.scaled_dot_product_attention(*tensors.inputs)
        results.append([out, *torch.autograd.grad(out.sum(), tensors.differentiable)])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_unknown_capability_is_refused() -> None:
    before = torch_ext._C.cpu_capability()
    with pytest.raises((RuntimeError, ValueError), match=r"default.*avx3"):
        torch_ext._C.set_cpu_capability("avx3")
    assert torch_ext._C.cpu_capability() == before


def _in_new_process(capability: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch, torch_ext; q = torch.randn(1, 2, 40, 16);"
        "torch_ext.scaled_dot_product_attention(q, q, q);"
        "print(torch_ext._C.cpu_capability(), torch_ext.last_attention_path())"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_EXT_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_variable() -> None:
    run = _in_new_process("default")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["default", "cpu.default.tile"]


def test_an_empty_variable_counts_as_unset() -> None:
    run = _in_new_process("")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == torch_ext._C.supported_cpu_capability()


@pytest.mark.parametrize("name", ["avx3", " ", "AVX2"])
def test_a_variable_that_names_nothing_raises_at_import(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import torch_ext"],
        env={**os.environ, "TORCH_EXT_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ValueError: TORCH_EXT_CPU_CAPABILITY takes default, avx2, ")
    assert message.endswith(f"got '{name}'")


class TestPath:
    """torch_ext.last_attention_path() tells where the newest call went."""

    def _path(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
        torch_ext.scaled_dot_product_attention(*(torch.randn(s, dtype=dtype) for s in shapes))
        return torch_ext.last_attention_path()

    def test_tile(self, cpu_capability: str) -> None:
        path = self._path((1, 2, 40, 16), (1, 2, 50, 16), (1, 2, 50, 16))
        assert path == f"cpu.{cpu_capability}.tile"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_decode(self, cpu_capability: str, dtype: torch.dtype) -> None:
        shape = (1, 2, 50, 16)
        assert self._path((1, 2, 1, 16), shape, shape, dtype=dtype) == (
            f"cpu.{cpu_capability}.decode"
        )

    def test_decode_in_double_is_tiled(self) -> None:
        shape = (1, 2, 50, 16)
        path = self._path((1, 2, 1, 16), shape, shape, dtype=torch.float64)
        assert path.endswith(".tile")

    def test_nothing_to_compute(self) -> None:
        assert self._path((1, 2, 0, 16), (1, 2, 5, 16), (1, 2, 5, 16)) == "cpu.empty"

    def test_backward(self, cpu_capability: str) -> None:
        query = torch.randn(1, 2, 40, 16, requires_grad=True)
        torch_ext.scaled_dot_product_attention(query, query, query).sum().backward()
        assert torch_ext.last_attention_path() == f"cpu.{cpu_capability}.backward"

    @pytest.mark.parametrize(
        "options",
        [{"dropout_p": 0.1}, {"is_causal": True}, {"scale": -1.0}],
        ids=["dropout", "causal", "scale"],
    )
    def test_options_stay_fused(self, cpu_capability: str, options: dict) -> None:
        query = torch.randn(1, 2, 40, 16)
        torch_ext.scaled_dot_product_attention(query, query, query, **options)
        assert torch_ext.last_attention_path() == f"cpu.{cpu_capability}.tile"

    def test_left_to_torch(self) -> None:
        """Inside sdpa_kernel() the chosen backend of torch runs, and the path says so."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        query = torch.randn(1, 2, 40, 16)
        with torch_ext.enabled():
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            assert torch_ext.last_attention_path().endswith(".tile")
            with sdpa_kernel(SDPBackend.MATH):
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
            assert torch_ext.last_attention_path().startswith("torch: ")
