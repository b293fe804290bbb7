"""Whether CMake compiles the CUDA sources (cmake/cuda_choice.cmake): the rules of cpp_build.py.

CMake runs the file as a script, on made-up machines: nothing is configured or compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout_copy import ROOT

_SCRIPT = """
set(CMAKE_MODULE_PATH {modules})
set(TORCH_EXT_CUDA {option})
set(TORCH_EXT_TORCH_ROOT {torch})
set(TORCH_EXT_CUTLASS_INCLUDE_DIR {cutlass})
set(_cuda_sources kernels/cuda/accumulate.cu)
include({choice})
message("${{TORCH_EXT_WITH_CUDA}}: ${{TORCH_EXT_CUDA_REASON}}")
"""
_FIND_CUDA_TOOLKIT = """
set(CUDAToolkit_FOUND {found})
set(CUDAToolkit_NVCC_EXECUTABLE /cuda/bin/nvcc)
set(CUDAToolkit_VERSION {version})
set(CUDAToolkit_VERSION_MAJOR {major})
"""


@dataclass(frozen=True)
class Machine:
    """What a machine has, and what its CMake is told."""

    folder: Path
    gpu: bool = False
    torch_cuda: str | None = "13.2"
    nvcc: str | None = "13.0"
    cutlass: str = "3.9"
    option: str = "AUTO"

    def choose(self, **variables: str) -> str:
        """The reason, or the message of the refusal behind "refused: "."""
        torch = self.folder / "torch"
        (torch / "lib").mkdir(parents=True)
        (torch / "version.py").write_text(f"cuda: str = {self.torch_cuda!r}\n")
        if self.torch_cuda is not None:
            (torch / "lib" / "libtorch_cuda.so").touch()
        tools = self.folder / "bin"
        tools.mkdir()
        smi = tools / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{'echo GPU 0: NVIDIA H100' if self.gpu else 'exit 9'}\n")
        smi.chmod(0o755)
        cutlass = self.folder / "cutlass"
        (cutlass / "cutlass").mkdir(parents=True)
        major, minor = self.cutlass.split(".")
        (cutlass / "cutlass" / "version.h").write_text(
            f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n"
        )
        modules = self.folder / "modules"
        modules.mkdir()
        nvcc = self.nvcc or "0.0"
        (modules / "FindCUDAToolkit.cmake").write_text(
            _FIND_CUDA_TOOLKIT.format(
                found=self.nvcc is not None, version=nvcc, major=nvcc.split(".")[0]
            )
        )
        script = self.folder / "script.cmake"
        script.write_text(
            _SCRIPT.format(
                modules=modules,
                option=self.option,
                torch=torch,
                cutlass=cutlass,
                choice=ROOT / "cmake" / "cuda_choice.cmake",
            )
        )
        ours = ("TORCH_EXT_CUDA", "FORCE_CUDA", "CUDA_VISIBLE_DEVICES", "CUTLASS_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment["PATH"] = os.pathsep.join([str(tools), environment.get("PATH", os.defpath)])
        if not self.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # the one that this machine may have
        done = subprocess.run(
            ["cmake", "-P", str(script)],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        text = re.sub(r"\s+", " ", done.stderr)
        if done.returncode != 0:
            return "refused: " + text.split("torch_ext: ", 1)[1].split(" Call Stack", 1)[0]
        return text.strip()


_NO_GPU = "OFF: without CUDA (no GPU is here; TORCH_EXT_CUDA=1 compiles for one all the same)"
_CUTLASS = "the CUDA kernels take the headers of CUTLASS 4.2 or newer, got 3.9: `pip install"


def test_nvcc_alone_is_not_enough(tmp_path: Path) -> None:
    assert Machine(tmp_path / "a").choose() == _NO_GPU
    assert Machine(tmp_path / "b").choose(FORCE_CUDA="0", TORCH_EXT_CUDA="") == _NO_GPU


@pytest.mark.parametrize(
    ("option", "variables", "request_"),
    [
        ("AUTO", {"TORCH_EXT_CUDA": "1"}, "TORCH_EXT_CUDA=1"),
        ("AUTO", {"FORCE_CUDA": "1"}, "FORCE_CUDA=1"),
        ("ON", {"TORCH_EXT_CUDA": "0"}, "TORCH_EXT_CUDA=ON"),
    ],
)
def test_where_cuda_was_asked_for_all_but_the_gpu_must_be_there(
    tmp_path: Path, option: str, variables: dict[str, str], request_: str
) -> None:
    refusal = Machine(tmp_path / "a", option=option).choose(**variables)
    assert refusal.startswith(f"refused: {request_}, but {_CUTLASS}")
    refusal = Machine(tmp_path / "b", option=option, nvcc=None).choose(**variables)
    assert refusal.startswith(f"refused: {request_}, but no nvcc was found")


@pytest.mark.parametrize(
    ("option", "variables", "reason"),
    [
        ("AUTO", {"TORCH_EXT_CUDA": "0", "FORCE_CUDA": "1"}, "TORCH_EXT_CUDA=0"),
        ("OFF", {"TORCH_EXT_CUDA": "1"}, "TORCH_EXT_CUDA=OFF"),
    ],
)
def test_turned_off(tmp_path: Path, option: str, variables: dict[str, str], reason: str) -> None:
    machine = Machine(tmp_path, gpu=True, option=option)
    assert machine.choose(**variables) == f"OFF: without CUDA ({reason})"


def test_what_is_missing_beside_a_gpu_is_said(tmp_path: Path) -> None:
    def reason(name: str, **parts: str | None) -> str:
        found = Machine(tmp_path / name, gpu=True, **parts).choose()  # type: ignore[arg-type]
        assert found.startswith("OFF: without CUDA (")
        return found

    assert "is built without CUDA" in reason("torch", torch_cuda=None)
    assert "no nvcc was found: put it on PATH" in reason("nvcc", nvcc=None)
    assert "nvcc 12.9 cannot compile for a LibTorch of CUDA 13" in reason("major", nvcc="12.9")
    assert _CUTLASS in reason("cutlass")


def test_another_value_is_refused(tmp_path: Path) -> None:
    for name, option, value in (("a", "AUTO", "yes"), ("b", "perhaps", "perhaps")):
        refusal = Machine(tmp_path / name, option=option).choose(TORCH_EXT_CUDA=value)
        assert refusal.startswith("refused: TORCH_EXT_CUDA takes 0 or 1 in the environment")
        assert refusal.endswith(f"got '{value}'")
