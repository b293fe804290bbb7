"""Copies of the checkout without build products, and the environment of what is built in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "libtorch_training"
TORCH_FOLDER = Path(torch.__file__).resolve().parent
_SOURCES = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "cmake",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "torch_ext",
)
_PRODUCTS = ("lib", "include", "share", "_C*.so", "__pycache__")
# Compilers by ccache, where that is installed: Debian, Fedora.
_COMPILER_CACHES = (Path("/usr/lib/ccache"), Path("/usr/lib64/ccache"))


def copy_checkout(folder: Path) -> Path:
    """The files that make the package, in a new ``folder``, as if cloned: nothing is compiled."""
    folder.mkdir(parents=True)
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            products = shutil.ignore_patterns("__pycache__")
            if name == "torch_ext":
                products = shutil.ignore_patterns(*_PRODUCTS)
            shutil.copytree(source, folder / name, ignore=products)
        else:
            shutil.copy(source, folder)
    return folder


def build_environment(checkout: Path, **variables: str) -> dict[str, str]:
    """This process's environment for a build of ``checkout``, without what would reach into it.

    ccache, where installed, finds what the other builds of the same sources have compiled: paths
    in csrc/ count as relative to the build folder, which is ``checkout/build/<name>`` in all.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "CMAKE_PREFIX_PATH", "Torch_DIR")
        and not name.startswith("TORCH_EXT_")
    }
    # ninja and cmake are the environment's.
    path = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    path[:0] = [str(folder) for folder in _COMPILER_CACHES if folder.is_dir()][:1]
    environment["PATH"] = os.pathsep.join(path)
    environment["CCACHE_BASEDIR"] = str(checkout / "csrc")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # The CUDA sources have tests of their own, and compile long.
    environment["TORCH_EXT_CUDA"] = "0"
    environment.update(variables)
    return environment


def run_command(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str], status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` in ``folder``; fails with its output where its exit status is another."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, (
        f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done
