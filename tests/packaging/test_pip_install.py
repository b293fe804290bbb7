"""``pip install --no-build-isolation .``: the package in site-packages is whole."""

from __future__ import annotations

import json
import os
import runpy
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch
from checkout_copy import ROOT, run_command
from ways_in import InstalledPackage

import torch_ext

_RELEASE = torch.__version__.split("+")[0]
_EXTENSION_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))

_ATTENTION = """
import torch, torch.nn.functional as F, torch_ext
query = torch.randn(2, 3, 40, 16, requires_grad=True)
expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
with torch_ext.enabled():
    out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
torch.testing.assert_close(out, expected)
out.sum().backward()
print(torch_ext.last_attention_path())
"""


def test_attention_runs_fused(installed: InstalledPackage, tmp_path: Path) -> None:
    done = run_command([installed.python, "-c", _ATTENTION], tmp_path, installed.environment)
    assert done.stdout.startswith("cpu.")
    assert done.stdout.strip().endswith(".backward")


def _files(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.rglob(pattern)}


def test_what_is_installed(installed: InstalledPackage) -> None:
    package = installed.package
    python = _files(ROOT / "torch_ext", "*.py")
    assert _files(package, "*.py") == python
    assert _files(package, "*.h") == {
        f"include/{name}" for name in _files(ROOT / "csrc" / "include", "*.h")
    }
    assert _files(package, "*.so") == {f"_C{_EXTENSION_SUFFIX}", "lib/libtorch_ext.so"}
    assert _files(package, "*.cmake") == {
        "share/cmake/torch_ext/torch_ext-config.cmake",
        "share/cmake/torch_ext/torch_ext-config-version.cmake",
        "share/cmake/torch_ext/torch_ext-libtorch.cmake",
    }
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()
    beside = {path.name for path in package.parent.iterdir()}
    assert not beside & {"csrc", "tests", "benchmarks", "examples", "cpp_build.py"}


def test_report(installed: InstalledPackage, tmp_path: Path) -> None:
    command = [installed.python, "-m", "torch_ext", "--json"]
    facts = json.loads(run_command(command, tmp_path, installed.environment).stdout)
    assert facts["torch_ext"] == torch_ext.__version__
    assert facts["torch_built_for"] == _RELEASE
    assert facts["torch_running"] == torch.__version__
    assert facts["cpu_capability"] == facts["cpu_capability_supported"]
    assert facts["cuda_version"] is None
    assert facts["enabled"] is False
    assert facts["compiled_at_import"] is False
    assert Path(facts["package"]) == installed.package
    assert Path(facts["cmake_prefix_path"]) == installed.package / "share" / "cmake"

    limited = installed.environment | {"TORCH_EXT_CPU_CAPABILITY": "default"}
    text = run_command(command[:-1], tmp_path, limited).stdout
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["torch_ext"].strip() == torch_ext.__version__
    assert lines["torch"].strip() == f"{torch.__version__} (built for {_RELEASE})"
    assert lines["instruction set"].strip().startswith("default (this CPU has ")
    assert lines["CUDA"].strip() == "not built"


def test_library_needs_no_python(installed: InstalledPackage, tmp_path: Path) -> None:
    library = installed.package / "lib" / "libtorch_ext.so"
    text = run_command(["readelf", "-d", library], tmp_path, dict(os.environ)).stdout
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]


def test_pip_says_what_it_builds(installed: InstalledPackage) -> None:
    line = f"torch_ext: building torch_ext {torch_ext.__version__} for torch {torch.__version__}, "
    assert line + "without CUDA (TORCH_EXT_CUDA=0)" in installed.pip_output


def test_setup_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation") as stopped:
        runpy.run_path(str(ROOT / "setup.py"))
    assert "no torch in the environment that builds" in str(stopped.value)


def test_setup_with_an_old_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"77\.0\.3 or newer, got 65\.5\.0:\n    pip install"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_choice_is_checked(installed: InstalledPackage) -> None:
    variables = installed.environment | {"TORCH_EXT_CUDA": "yes"}
    done = run_command([sys.executable, "setup.py", "--version"], ROOT, variables, status=1)
    message = done.stderr.splitlines()[-1]
    assert message == "torch_ext: TORCH_EXT_CUDA takes 0 or 1, got 'yes'"
