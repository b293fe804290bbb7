"""Finds and loads the compiled library, before anything else of the package needs it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import checkout_build, cpp_build

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libtorch_ext.so"
RECORD = LIBRARY.parent / cpp_build.BUILD_INFO
CSRC = PACKAGE.parent / "csrc"


@dataclass(frozen=True)
class NativeLibrary:
    """What was loaded: the operators' library, the Python module, and what they were built for."""

    library: Path
    module: ModuleType
    build_info: dict[str, Any]
    compiled_at_import: bool


def _is_checkout() -> bool:
    return (CSRC / "sources_cpu.txt").is_file()


def _how_to_rebuild() -> str:
    if _is_checkout():
        return f"Run `make build` in {PACKAGE.parent}, or delete {LIBRARY.parent}"
    command = "pip install --no-build-isolation --no-deps --force-reinstall ."
    return f"Run `{command}` in a checkout of torch_ext"


def check_build(info: dict[str, Any]) -> None:
    """Refuses a library built for another torch, before the loader meets an undefined symbol.

    Raises:
        ImportError: with both versions, and what to run.
    """
    running = cpp_build.release(torch.__version__)
    built = str(info.get("torch_version"))
    if built != running:
        raise ImportError(
            f"torch_ext: this library was built for torch {built}, but torch {running} is running: "
            f"rebuild it. {_how_to_rebuild()}"
        )
    cuda = info.get("cuda_version")
    running_cuda = (torch.version.cuda or "").split(".")[0]
    if cuda is not None and str(cuda).split(".")[0] != running_cuda:
        has = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise ImportError(
            f"torch_ext: this library was built for torch {built} with CUDA {cuda}, but the torch "
            f"that is running has {has}: rebuild it. {_how_to_rebuild()}"
        )


def _load_prebuilt(info: dict[str, Any]) -> NativeLibrary:
    check_build(info)
    if not cpp_build.is_whole(LIBRARY):
        raise ImportError(
            f"torch_ext: the library {LIBRARY} has been cut: rebuild it. {_how_to_rebuild()}"
        )
    try:
        torch.ops.load_library(LIBRARY)
        module = importlib.import_module("torch_ext._C")
    except ModuleNotFoundError as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"torch_ext: the library is there, but not its module for Python {python} "
            f"({PACKAGE / '_C.*.so'}): rebuild it. {_how_to_rebuild()}"
        ) from error
    except (OSError, ImportError) as error:  # a file that is not whole
        raise ImportError(
            f"torch_ext: the library cannot be loaded: {error}: rebuild it. {_how_to_rebuild()}"
        ) from error
    return NativeLibrary(LIBRARY, module, info, compiled_at_import=False)


def _load_checkout() -> NativeLibrary:
    build = checkout_build.load_checkout(CSRC)
    # As if it were a file of the package.
    sys.modules["torch_ext._C"] = build.module
    vars(sys.modules["torch_ext"])["_C"] = build.module
    return NativeLibrary(build.library, build.module, build.record, compiled_at_import=True)


def _load() -> NativeLibrary:
    # The record is written last: without it, or with half of it, nothing has been built.
    record = cpp_build.read_record(RECORD)
    if LIBRARY.is_file() and record is not None:
        return _load_prebuilt(record)
    if _is_checkout():
        return _load_checkout()
    missing = RECORD if LIBRARY.is_file() else LIBRARY
    raise ImportError(
        f"torch_ext: the installation is incomplete: there is no whole {missing}. "
        f"{_how_to_rebuild()}"
    )


loaded = _load()
"""The one library of this process."""

# Read when a kernel is first chosen, in Python now: a name that is none must not wait until then.
loaded.module.cpu_capability()
