"""examples/libtorch_training against the installed package, from pip and from CMake alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from checkout_copy import EXAMPLE, TORCH_FOLDER, build_environment, run_command
from ways_in import InstalledPackage, build_example


def _trains(program: Path, folder: Path) -> None:
    # Nothing in the environment tells the loader where the libraries are.
    done = run_command([program, "60", "64"], folder, {"PATH": "/usr/bin:/bin"})
    found = re.search(r"largest difference of losses (\S+), path (\S+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found.group(1)) < 0.02
    assert re.fullmatch(r"cpu\.\w+\.backward", found.group(2))


def test_against_the_python_package(installed: InstalledPackage, tmp_path: Path) -> None:
    ask = "import torch_ext; print(torch_ext.cmake_prefix_path)"
    command = [installed.python, "-c", ask]
    prefix = run_command(command, tmp_path, installed.environment).stdout.strip()
    _trains(build_example(Path(prefix), tmp_path / "build"), tmp_path)


def test_against_cmake_install(cmake_prefix: Path, tmp_path: Path) -> None:
    _trains(build_example(cmake_prefix, tmp_path / "build"), tmp_path)


def test_cmake_install_has_no_python(cmake_prefix: Path) -> None:
    files = {str(path.relative_to(cmake_prefix)) for path in cmake_prefix.rglob("*.*")}
    assert "lib/libtorch_ext.so" in files
    assert "include/torch_ext/torch_ext.h" in files
    assert not [name for name in files if "_C." in name or name.endswith(".py")]


@pytest.mark.parametrize(
    ("text", "other", "message"),
    [
        (
            '(set\\(_torch_ext_built_for ")[0-9.]+',
            "2.10.0",
            "torch_ext: this library was built for torch 2.10.0, but torch [0-9.]+ was found in",
        ),
        ('("@TORCH_EXT|")/[^"]*("\\))', None, "torch_ext: no LibTorch found: add its folder to"),
    ],
    ids=["another torch", "no torch"],
)
def test_package_refuses(
    cmake_prefix: Path, tmp_path: Path, text: str, other: str | None, message: str
) -> None:
    prefix = tmp_path / "prefix"
    shutil.copytree(cmake_prefix / "share", prefix / "share")
    config = prefix / "share" / "cmake" / "torch_ext" / "torch_ext-config.cmake"
    replacement = rf"\g<1>{other}" if other is not None else r"\g<1>/nowhere\g<2>"
    changed, count = re.subn(text, replacement, config.read_text(), count=1)
    assert count == 1
    config.write_text(changed)
    command = ["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", "-G", "Ninja"]
    done = run_command(
        [*command, f"-DCMAKE_PREFIX_PATH={prefix}"], tmp_path, build_environment(tmp_path), 1
    )
    assert re.search(message, re.sub(r"\s+", " ", done.stderr)), done.stderr


def test_libtorch_itself_is_refused_when_too_old(tmp_path: Path) -> None:
    """CMake stops before it compiles anything."""
    torch_2_10 = tmp_path / "libtorch"
    version = torch_2_10 / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text(
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n"
        "#define TORCH_VERSION_PATCH 0\n"
    )
    (torch_2_10 / "lib").mkdir()
    (torch_2_10 / "lib" / "libtorch_cpu.so").symlink_to(TORCH_FOLDER / "lib" / "libtorch_cpu.so")
    command = ["cmake", "-S", EXAMPLE.parents[1], "-B", tmp_path / "build", "-G", "Ninja"]
    done = run_command(
        [*command, f"-DCMAKE_PREFIX_PATH={torch_2_10}"], tmp_path, build_environment(tmp_path), 1
    )
    text = re.sub(r"\s+", " ", done.stderr)
    assert f"torch_ext: takes torch 2.11 or newer, got 2.10.0 in {torch_2_10}" in text
