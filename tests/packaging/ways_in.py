"""The three ways in, each built from a copy of the checkout."""

from __future__ import annotations

import os
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from checkout_copy import (
    EXAMPLE,
    ROOT,
    TORCH_FOLDER,
    build_environment,
    copy_checkout,
    run_command,
)


@dataclass(frozen=True)
class InstalledPackage:
    """What ``pip install`` has put into an environment that has torch."""

    checkout: Path
    python: Path
    package: Path
    environment: dict[str, str]
    pip_output: str


def pip_install(folder: Path) -> InstalledPackage:
    """``pip install --no-build-isolation .`` into a new environment in ``folder``."""
    checkout = copy_checkout(folder / "checkout")
    python, site_packages = _new_environment(folder / "environment")
    environment = build_environment(checkout)
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-index", "--verbose"]
    done = run_command([*install, "."], checkout, environment)
    output = done.stdout + done.stderr
    return InstalledPackage(checkout, python, site_packages / "torch_ext", environment, output)


@dataclass(frozen=True)
class Wheel:
    """A wheel, and an environment that has it and torch."""

    file: Path
    python: Path


def build_wheel(installed: InstalledPackage, folder: Path) -> Wheel:
    """The command of ``make wheel``, where ``pip install`` has compiled everything already."""
    pip = [installed.python, "-m", "pip"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder / "dist"]
    run_command([*pip, "wheel", *options, "."], installed.checkout, installed.environment)
    (file,) = (folder / "dist").iterdir()
    python, _ = _new_environment(folder / "environment")
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", file]
    run_command(install, folder, installed.environment)
    return Wheel(file, python)


def _new_environment(new: Path) -> tuple[Path, Path]:
    """Its interpreter and its folder of packages, among which torch and pip are shared ones."""
    venv.create(new, symlinks=True)
    python = new / "bin" / "python"
    places = {"base": str(new), "platbase": str(new)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", vars=places))
    # torch and pip are those of the environment that runs this: gigabytes.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "shared.pth").write_text("".join(f"{path}\n" for path in sorted(shared)))
    return python, site_packages


@dataclass(frozen=True)
class ImportedCheckout:
    """A checkout on PYTHONPATH, and what its first imports wrote to standard error."""

    checkout: Path
    environment: dict[str, str]
    refusal: str
    first_imports: tuple[str, str]


def import_checkout(folder: Path) -> ImportedCheckout:
    """``import torch_ext``: with TORCH_EXT_JIT=0, then by two processes at once."""
    checkout = copy_checkout(folder / "checkout")
    environment = build_environment(
        checkout, PYTHONPATH=str(checkout), TORCH_EXTENSIONS_DIR=str(checkout / "build")
    )
    command = [sys.executable, "-c", "import torch_ext"]
    refusal = run_command(command, folder, environment | {"TORCH_EXT_JIT": "0"}, status=1).stderr
    script = '"$1" -c "import torch_ext" 2>first & "$1" -c "import torch_ext" 2>second && wait $!'
    run_command(["bash", "-c", script, "bash", sys.executable], folder, environment)
    outputs = (folder / "first").read_text(), (folder / "second").read_text()
    return ImportedCheckout(checkout, environment, refusal, outputs)


def cmake_install(folder: Path) -> Path:
    """CMake alone, without Python; returns the prefix."""
    checkout = copy_checkout(folder / "checkout")
    environment = build_environment(checkout)
    build = checkout / "build" / "library"
    configure = ["cmake", "-S", checkout, "-B", build, "-G", "Ninja"]
    options = [f"-DCMAKE_PREFIX_PATH={TORCH_FOLDER}", "-DTORCH_EXT_CUDA=OFF"]
    run_command([*configure, *options], folder, environment)
    jobs = os.environ.get("MAX_JOBS", "1")
    run_command(["cmake", "--build", build, "--parallel", jobs], folder, environment)
    run_command(["cmake", "--install", build, "--prefix", folder / "prefix"], folder, environment)
    return folder / "prefix"


def build_example(prefix: Path, folder: Path) -> Path:
    """The program of examples/libtorch_training, built against the package in ``prefix``."""
    environment = build_environment(folder)
    configure = ["cmake", "-S", EXAMPLE, "-B", folder, "-G", "Ninja"]
    run_command([*configure, f"-DCMAKE_PREFIX_PATH={prefix}"], ROOT, environment)
    run_command(["cmake", "--build", folder], ROOT, environment)
    return folder / "libtorch_training"
