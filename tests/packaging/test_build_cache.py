"""The cache of the build at import: whatever happened to it, an import compiles anew, loads what is
whole, or says what is wrong. On a checkout with a library of a few lines."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout_copy import ROOT, build_environment

_HANGS = 600  # s
_MODULE = """
#include <Python.h>
static PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString("none"); }
static PyMethodDef methods[] = {{"cpu_capability", cpu_capability, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "torch_ext_C", "", -1, methods};
PyMODINIT_FUNC PyInit_torch_ext_C() { return PyModule_Create(&module); }
"""
# A compiler that says when it has begun, and waits for a file before it goes on.
_SLOW_COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
  touch "{folder}/begun"
  while [ ! -e "{folder}/go" ]; do sleep 0.05; done;;
esac
exec {compiler} "$@"
"""


class Checkout:
    """One that has not been compiled, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "torch_ext"
        package.mkdir(parents=True)
        for name in ("cpp_build.py", "checkout_build.py", "native_library.py"):
            shutil.copy(ROOT / "torch_ext" / name, package)
        (package / "__init__.py").write_text("from torch_ext.native_library import loaded\n")
        csrc = folder / "csrc"
        (csrc / "ops").mkdir(parents=True)
        (csrc / "ops" / "python_module.cpp").write_text(_MODULE)
        (csrc / "one.cpp").write_text("int one() { return 1; }\n")
        (csrc / "sources_cpu.txt").write_text("one.cpp\n")
        (csrc / "sources_cuda.txt").write_text("")
        (csrc / "compile_flags.txt").write_text("-O1\n")
        version = csrc / "include" / "torch_ext" / "version.h"
        version.parent.mkdir(parents=True)
        version.write_text('#define TORCH_EXT_VERSION "0.0.1"\n')
        self.environment = build_environment(
            folder,
            PYTHONPATH=str(folder),
            TORCH_EXTENSIONS_DIR=str(folder / "cache"),
            CCACHE_DISABLE="1",
        )

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "import torch_ext; print(torch_ext.loaded.build_info)"],
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def succeed(self, **variables: str) -> str:
        """Imports; returns what the import said."""
        process = self.start(**variables)
        out, err = process.communicate(timeout=_HANGS)
        assert process.returncode == 0, err
        assert "'version': '0.0.1'" in out
        return err

    def refused(self, **variables: str) -> str:
        """What the import said, the error last."""
        process = self.start(**variables)
        _, err = process.communicate(timeout=_HANGS)
        assert process.returncode == 1
        return err

    @property
    def record(self) -> Path:
        (record,) = (self.folder / "cache").glob("*/build_info.json")
        return record


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


@pytest.fixture
def slow_compiler(tmp_path: Path) -> Iterator[Path]:
    """The folder in which a file "go" ends its waiting."""
    folder = tmp_path / "slow"
    folder.mkdir()
    compiler = folder / "g++"
    compiler.write_text(_SLOW_COMPILER.format(folder=folder, compiler=shutil.which("g++")))
    compiler.chmod(0o755)
    yield folder
    (folder / "go").touch()


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


def test_a_record_that_is_not_whole_means_not_built(checkout: Checkout) -> None:
    assert "torch_ext: compiled in" in checkout.succeed()
    whole = checkout.record.read_text()
    assert json.loads(whole)["version"] == "0.0.1"
    for cut in ("", whole[:20], "[]"):
        checkout.record.write_text(cut)
        assert "TORCH_EXT_JIT=0 forbids" in checkout.refused(TORCH_EXT_JIT="0")
    assert "torch_ext: compiled in" in checkout.succeed()
    assert checkout.record.read_text() == whole
    assert checkout.succeed(TORCH_EXT_JIT="0") == ""


def test_a_killed_build_is_survived(checkout: Checkout, slow_compiler: Path) -> None:
    killed = checkout.start(CXX=str(slow_compiler / "g++"), MAX_JOBS="1")
    _wait_for(slow_compiler / "begun")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # Its compiler lives on, and will write its object.
    assert "torch_ext: compiled in" in checkout.succeed()
    (slow_compiler / "go").touch()
    assert checkout.succeed(TORCH_EXT_JIT="0") == ""
    names = sorted(path.name for path in (checkout.folder / "cache").iterdir())
    assert not [name for name in names if "killed" in name]


def test_two_first_imports_compile_once(checkout: Checkout, slow_compiler: Path) -> None:
    first = checkout.start(CXX=str(slow_compiler / "g++"))
    _wait_for(slow_compiler / "begun")
    second = checkout.start()
    assert second.stderr is not None
    line = second.stderr.readline()
    assert line.startswith("torch_ext: waiting for another process, which compiles it in ")
    (slow_compiler / "go").touch()
    assert "torch_ext: compiled in" in first.communicate(timeout=_HANGS)[1]
    assert second.communicate(timeout=_HANGS)[1] == ""
    assert (first.returncode, second.returncode) == (0, 0)


def test_what_does_not_compile_is_tried_again(checkout: Checkout) -> None:
    source = checkout.folder / "csrc" / "one.cpp"
    source.write_text("int one() { return }\n")
    assert "Error building extension 'torch_ext_C'" in checkout.refused()
    source.write_text("int one() { return 1; }\n")
    checkout.succeed()


def test_a_folder_that_cannot_be_written_is_named(checkout: Checkout) -> None:
    file = checkout.folder / "file"
    file.touch()
    for place in (file / "below", Path("/proc/torch_ext")):  # root may write anywhere else
        message = checkout.refused(TORCH_EXTENSIONS_DIR=str(place))
        assert "torch_ext: compiling it takes a folder that can be written, and " in message
        assert str(place) in message
        assert "Set TORCH_EXTENSIONS_DIR to another folder" in message


def test_a_library_that_was_cut_means_not_built(checkout: Checkout) -> None:
    checkout.succeed()
    library = checkout.record.parent / "torch_ext_C.so"
    library.write_bytes(library.read_bytes()[:5000])  # loaded, it would kill the process
    assert "TORCH_EXT_JIT=0 forbids" in checkout.refused(TORCH_EXT_JIT="0")
    assert "torch_ext: compiled in" in checkout.succeed()
    assert checkout.succeed(TORCH_EXT_JIT="0") == ""


def test_a_library_that_cannot_be_loaded_is_named(checkout: Checkout) -> None:
    checkout.succeed()
    library = checkout.record.parent / "torch_ext_C.so"
    content = bytearray(library.read_bytes())
    content[4] = 1  # of a 32-bit machine
    library.write_bytes(content)
    message = checkout.refused()
    assert f"torch_ext: {library} cannot be loaded" in message
    assert f"Delete {library.parent}" in message


def test_a_library_in_place_without_its_record_is_not_built(checkout: Checkout) -> None:
    """As a `make build` leaves it that ended while it linked."""
    folder = checkout.folder / "torch_ext" / "lib"
    folder.mkdir()
    (folder / "libtorch_ext.so").write_bytes(b"\x7fELF")
    for record in (None, '{"version": "0.0.1"'):
        if record is not None:
            (folder / "build_info.json").write_text(record)
        assert "has not been compiled" in checkout.refused(TORCH_EXT_JIT="0")
