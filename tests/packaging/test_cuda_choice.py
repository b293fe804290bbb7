"""Whether, for what and with what the CUDA sources are compiled from Python (cpp_build.py)."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkout_copy import ROOT

CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def cpp_build() -> ModuleType:
    """As setup.py loads it."""
    spec = importlib.util.spec_from_file_location("cpp_build", ROOT / "torch_ext" / "cpp_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpp_build"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    del sys.modules["cpp_build"]
    return module


@pytest.fixture
def cuda_machine(
    cpp_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> pytest.MonkeyPatch:
    """A machine with everything: a GPU, torch with CUDA, its nvcc, CUTLASS, no wishes."""
    for name in ("TORCH_EXT_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp_build, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(cpp_build, "_nvcc_release", lambda home: "13.0")
    monkeypatch.setattr(
        cpp_build, "torch_cpp_extension", lambda: type("Extension", (), {"CUDA_HOME": "/cuda"})
    )
    version = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    return monkeypatch


def test_builds_with_cuda_where_all_is_there(
    cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choice = cpp_build.choose_cuda(CSRC)
    assert choice.on
    assert choice.architectures == "8.0;9.0a;10.0;12.0+PTX"
    assert choice.cutlass == str(tmp_path / "cutlass" / "include")
    plan = cpp_build.plan_build(CSRC)
    assert any(source.suffix == ".cu" for source in plan.sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in plan.nvcc_flags
    assert "-gencode=arch=compute_120,code=compute_120" in plan.nvcc_flags
    assert "-gencode=arch=compute_100,code=compute_100" not in plan.nvcc_flags
    assert plan.libraries == ["cublasLt"]
    assert "with CUDA (nvcc 13.0 in /cuda; 8.0;9.0a;10.0;12.0+PTX)" in plan.describe()


def test_an_older_nvcc_stops_at_hopper(
    cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch
) -> None:
    cuda_machine.setattr(torch.version, "cuda", "12.6")
    cuda_machine.setattr(cpp_build, "_nvcc_release", lambda home: "12.6")
    assert cpp_build.choose_cuda(CSRC).architectures == "8.0;9.0a;9.0+PTX"


def test_architectures_of_the_environment(
    cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch
) -> None:
    cuda_machine.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    flags = [flag for flag in cpp_build.plan_build(CSRC).nvcc_flags if "gencode" in flag]
    assert flags == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    for wrong in ("Hopper", "7.5", "90", "8.0,9.0"):
        cuda_machine.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(
            cpp_build.BuildError,
            match=re.escape(
                "TORCH_CUDA_ARCH_LIST takes numbers from 8.0 on, as in 8.0;9.0a;12.0+PTX, "
                f"got '{wrong}'"
            ),
        ):
            cpp_build.plan_build(CSRC)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("torch", "is built without CUDA"),
        ("nvcc", "no nvcc was found: put it on PATH or set CUDA_HOME"),
        ("major", "nvcc 12.9 in /cuda cannot compile for a torch built with CUDA 13.2"),
    ],
)
def test_what_is_missing_is_said(
    cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch, attribute: str, reason: str
) -> None:
    if attribute == "torch":
        cuda_machine.setattr(torch.version, "cuda", None)
    else:
        found = {"nvcc": None, "major": "12.9"}[attribute]
        cuda_machine.setattr(cpp_build, "_nvcc_release", lambda home: found)
    plan = cpp_build.plan_build(CSRC)
    assert not plan.cuda.on
    assert not any(source.suffix == ".cu" for source in plan.sources)
    assert f"without CUDA ({plan.cuda.reason})" in plan.describe()
    assert reason in plan.cuda.reason
    for name in ("TORCH_EXT_CUDA", "FORCE_CUDA"):
        with cuda_machine.context() as asked:
            asked.setenv(name, "1")
            with pytest.raises(cpp_build.BuildError, match=f"{name}=1, but .*{re.escape(reason)}"):
                cpp_build.plan_build(CSRC)


@pytest.mark.parametrize("forced", [False, True])
def test_turned_off(cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch, forced: bool) -> None:
    cuda_machine.setenv("TORCH_EXT_CUDA", "0")
    if forced:
        cuda_machine.setenv("FORCE_CUDA", "1")
    choice = cpp_build.choose_cuda(CSRC)
    assert (choice.on, choice.reason) == (False, "TORCH_EXT_CUDA=0")


def test_nvcc_alone_is_not_enough(cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch) -> None:
    cuda_machine.setattr(cpp_build, "_has_gpu", lambda: False)
    for name, value in (("TORCH_EXT_CUDA", ""), ("FORCE_CUDA", "0")):
        cuda_machine.setenv(name, value)
        choice = cpp_build.choose_cuda(CSRC)
        assert not choice.on
        assert choice.reason == "no GPU is here; TORCH_EXT_CUDA=1 compiles for one all the same"
    for name in ("TORCH_EXT_CUDA", "FORCE_CUDA"):
        with cuda_machine.context() as asked:
            asked.setenv(name, "1")
            assert cpp_build.choose_cuda(CSRC).on


def test_the_search_for_a_gpu_leaves_cuda_alone(cpp_build: ModuleType) -> None:
    """The processes that the importing one forks may still start CUDA."""
    assert isinstance(cpp_build._has_gpu(), bool)
    assert not torch.cuda.is_initialized()


def test_missing_cutlass_is_an_error_where_cuda_was_asked_for(
    cpp_build: ModuleType, cuda_machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda_machine.setattr(cpp_build.importlib.util, "find_spec", lambda name: None)
    old = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    old.write_text("#define CUTLASS_MAJOR 3\n#define CUTLASS_MINOR 9\n")
    for got in ("3.9", "none"):
        choice = cpp_build.choose_cuda(CSRC)
        assert not choice.on
        assert f"take the headers of CUTLASS 4.2 or newer, got {got}:" in choice.reason
        assert "pip install 'nvidia-cutlass>=4.2'" in choice.reason
        with cuda_machine.context() as asked:
            asked.setenv("FORCE_CUDA", "1")
            with pytest.raises(cpp_build.BuildError, match="FORCE_CUDA=1, but the CUDA kernels"):
                cpp_build.choose_cuda(CSRC)
        cuda_machine.delenv("CUTLASS_PATH", raising=False)


def test_cmake_has_the_same_defaults(cpp_build: ModuleType) -> None:
    text = (ROOT / "cmake" / "cuda_kernels.cmake").read_text()
    assert f'"{cpp_build.CUDA_ARCHITECTURES}"' in text
    assert f'"{cpp_build.CUDA_ARCHITECTURES_BEFORE_12_8}"' in text
    oldest = ".".join(map(str, cpp_build.OLDEST_CUTLASS))
    assert f"VERSION_LESS {oldest}" in (ROOT / "cmake" / "cutlass.cmake").read_text()


def test_a_kernel_file_has_a_source_line() -> None:
    listed = {
        line
        for line in (CSRC / "sources_cuda.txt").read_text().splitlines()
        if line.endswith(".cu")
    }
    files = {str(file.relative_to(CSRC)) for file in CSRC.rglob("*.cu")}
    assert listed == files
