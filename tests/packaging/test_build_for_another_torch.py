"""A library that does not fit the torch or the Python that runs says so, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkout_copy import run_command
from ways_in import InstalledPackage

_RUNNING = torch.__version__.split("+")[0]
_COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall ."
_REINSTALL = f"Run `{_COMMAND}` in a checkout of torch_ext"


@pytest.fixture
def package(installed: InstalledPackage, tmp_path: Path) -> Path:
    """A copy of the installed package, to be damaged."""
    return Path(shutil.copytree(installed.package, tmp_path / "site" / "torch_ext"))


def _import_error(installed: InstalledPackage, package: Path) -> str:
    variables = installed.environment | {"PYTHONPATH": str(package.parent)}
    command = [installed.python, "-c", "import torch_ext"]
    return run_command(command, package.parent, variables, status=1).stderr.splitlines()[-1]


def _record(package: Path, **changes: str) -> None:
    file = package / "lib" / "build_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_torch(installed: InstalledPackage, package: Path) -> None:
    _record(package, torch_version="2.12.1")
    assert _import_error(installed, package) == (
        f"ImportError: torch_ext: this library was built for torch 2.12.1, but torch {_RUNNING} is "
        f"running: rebuild it. {_REINSTALL}"
    )


def test_another_cuda(installed: InstalledPackage, package: Path) -> None:
    _record(package, cuda_version="99.1")
    has = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    assert _import_error(installed, package) == (
        f"ImportError: torch_ext: this library was built for torch {_RUNNING} with CUDA 99.1, but "
        f"the torch that is running has {has}: rebuild it. {_REINSTALL}"
    )


def test_another_python(installed: InstalledPackage, package: Path) -> None:
    (module,) = package.glob("_C.*.so")
    module.rename(package / "_C.cpython-399-x86_64-linux-gnu.so")
    message = _import_error(installed, package)
    assert "the library is there, but not its module for Python 3." in message
    assert message.endswith(_REINSTALL)


def test_library_missing(installed: InstalledPackage, package: Path) -> None:
    (package / "lib" / "libtorch_ext.so").unlink()
    message = _import_error(installed, package)
    assert "the installation is incomplete: there is no whole " in message
    assert message.endswith(_REINSTALL)


@pytest.mark.parametrize("text", [None, "", '{"version": '])
def test_record_not_whole(installed: InstalledPackage, package: Path, text: str | None) -> None:
    record = package / "lib" / "build_info.json"
    record.unlink()
    if text is not None:
        record.write_text(text)
    message = _import_error(installed, package)
    assert f"the installation is incomplete: there is no whole {record}" in message
    assert message.endswith(_REINSTALL)


def test_library_not_whole(installed: InstalledPackage, package: Path) -> None:
    library = package / "lib" / "libtorch_ext.so"
    library.write_bytes(library.read_bytes()[:100_000])  # loaded, it would kill the process
    message = _import_error(installed, package)
    assert f"torch_ext: the library {library} has been cut: rebuild it." in message
    assert message.endswith(_REINSTALL)


def test_checkout_names_make_build(installed: InstalledPackage, package: Path) -> None:
    _record(package, torch_version="2.12.1")
    (package.parent / "csrc").mkdir()
    (package.parent / "csrc" / "sources_cpu.txt").touch()
    message = _import_error(installed, package)
    assert message.endswith(f"Run `make build` in {package.parent}, or delete {package / 'lib'}")
