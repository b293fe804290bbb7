"""``make wheel``: named after its platform and its torch, and whole."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import setuptools
import torch
from checkout_copy import ROOT, copy_checkout, run_command
from ways_in import InstalledPackage, Wheel

import torch_ext

_RELEASE = torch.__version__.split("+")[0]
_PROGRAM = """
import importlib.metadata, torch, torch_ext
print(importlib.metadata.version("torch_ext"), torch_ext.__file__)
query = torch.randn(2, 3, 40, 16)
with torch_ext.enabled():
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
print(torch_ext.last_attention_path())
"""


def test_the_name_has_the_torch_and_the_platform(wheel: Wheel) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.file.name == (
        f"torch_ext-{torch_ext.__version__}+torch{_RELEASE}-{tag}-{tag}-"
        f"linux_{platform.machine()}.whl"
    )


def test_a_clean_environment_imports_it(
    wheel: Wheel, installed: InstalledPackage, tmp_path: Path
) -> None:
    done = run_command([wheel.python, "-c", _PROGRAM], tmp_path, installed.environment)
    first, path = done.stdout.splitlines()
    version, file = first.split(" ", 1)
    assert version == f"{torch_ext.__version__}+torch{_RELEASE}"
    assert Path(file).is_relative_to(wheel.python.parents[1])
    assert path.startswith("cpu.")


def test_what_is_in_it(wheel: Wheel) -> None:
    names = zipfile.ZipFile(wheel.file).namelist()
    assert len(names) == len(set(names))
    for name in ("lib/libtorch_ext.so", "lib/build_info.json", "include/torch_ext/torch_ext.h"):
        assert f"torch_ext/{name}" in names
    assert not [name for name in names if not name.startswith(("torch_ext/", "torch_ext-"))]


def test_make_wheel_runs_this_command() -> None:
    rule = (ROOT / "Makefile").read_text().split("\nwheel: ", 1)[1].split("\n\n", 1)[0]
    assert "pip wheel" in rule
    assert "--no-build-isolation --no-deps --wheel-dir dist ." in rule


def test_an_isolated_build_says_what_to_type(tmp_path: Path) -> None:
    """``pip install .`` makes an environment with setuptools alone, then calls this hook."""
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    packages = Path(setuptools.__file__).parent.parent
    # setuptools imports _distutils_hack, and reads its version from its metadata.
    for part in ("setuptools", "_distutils_hack", f"setuptools-{setuptools.__version__}.dist-info"):
        (isolated / part).symlink_to(packages / part)
    hook = (
        f"import sys; sys.path.insert(0, {str(isolated)!r}); from setuptools import build_meta; "
        "build_meta.get_requires_for_build_wheel()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", hook],
        cwd=copy_checkout(tmp_path / "checkout"),
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "torch_ext: no torch in the environment that builds." in done.stderr
    assert "    pip install --no-build-isolation ." in done.stderr
