"""A bare checkout compiles itself: at its first import, once, into torch's folder of extensions."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import cpp_build
from .cpp_build import BuildError, BuildPlan

MODULE = "torch_ext_C"


@dataclass(frozen=True)
class CheckoutBuild:
    """The module that is ``torch_ext._C``, with the operators registered; its file and record."""

    module: ModuleType
    library: Path
    record: dict[str, Any]


def _say(line: str) -> None:
    print(f"torch_ext: {line}", file=sys.stderr, flush=True)


def _digest(plan: BuildPlan) -> str:
    """Of every file under csrc and of the flags: what the compiled module is made of."""
    digest = hashlib.sha256(repr((plan.info(), plan.nvcc_flags)).encode())
    for file in sorted(path for path in plan.csrc.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(plan.csrc)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _build_folder(plan: BuildPlan) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = root or cpp_build.torch_cpp_extension().get_default_build_root()
    # The checkout too is part of the name: two of them do not rebuild each other's.
    key = "|".join(
        [
            str(plan.csrc),
            torch.__version__,
            sysconfig.get_config_var("SOABI") or "",
            str(plan.cuda),
        ]
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    name = f"torch_ext-torch{cpp_build.release(torch.__version__)}-{digest}"
    return Path(root).absolute() / name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be moved away.
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process, which compiles it in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _fresh_or_finished(folder: Path) -> Iterator[None]:
    """Leaves ``folder`` empty where a build in it was killed.

    The compilers of a killed build go on for a while, and would write into the files of the next
    one: they keep a folder that has been moved away. A build that failed ended in good order, and
    what it compiled is of use.
    """
    unfinished = folder / "unfinished"
    if unfinished.exists():
        folder.rename(folder.with_name(f"{folder.name}-killed-{os.getpid()}"))
    for killed in folder.parent.glob(f"{folder.name}-killed-*"):
        shutil.rmtree(killed, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    # torch's own lock is a file that a killed build leaves behind, and then waits for for ever.
    (folder / "lock").unlink(missing_ok=True)
    unfinished.touch()
    try:
        yield
    except Exception:  # not KeyboardInterrupt
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.unlink(missing_ok=True)


def _import_from(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"torch_ext: {library} cannot be loaded ({error}). Delete {library.parent}: the next "
            "import compiles it again"
        ) from error
    return module


def _compile(plan: BuildPlan, folder: Path) -> ModuleType:
    cpp_extension = cpp_build.torch_cpp_extension()
    if not cpp_extension.is_ninja_available():
        raise BuildError("torch_ext: compiling it takes ninja: pip install ninja")
    cpp_build.limit_jobs()
    _say(f"compiling {plan.describe()}, once, in a few minutes; it is kept in {folder}")
    start = time.monotonic()
    torch_numbers = cpp_build.numbers(torch.__version__)[:2]
    module: ModuleType = cpp_extension.load(
        name=MODULE,
        sources=[str(source) for source in [*plan.sources, plan.module_source]],
        extra_include_paths=[str(folder) for folder in plan.include_dirs],
        # torch 2.15 has put the standard before these already.
        extra_cflags=plan.cxx_flags + (plan.standard if torch_numbers < (2, 15) else []),
        extra_cuda_cflags=plan.nvcc_flags,
        extra_ldflags=["-fopenmp", *(f"-l{name}" for name in plan.libraries)],
        build_directory=str(folder),
        with_cuda=plan.cuda.on,
    )
    _say(f"compiled in {time.monotonic() - start:.0f} s")
    return module


def load_checkout(csrc: Path) -> CheckoutBuild:
    """Compiles the library of a bare checkout, or takes what an earlier import compiled.

    Raises:
        BuildError: ``TORCH_EXT_JIT=0``, a tool is missing, or the folder cannot be written.
        RuntimeError: the compiler failed; the message has its output.
    """
    try:
        plan = cpp_build.plan_build(csrc)
        folder = _build_folder(plan)
    except ModuleNotFoundError as error:
        raise BuildError(
            f"torch_ext: compiling it takes {error.name}: pip install {error.name}"
        ) from error
    library = folder / f"{MODULE}.so"
    file = folder / cpp_build.BUILD_INFO
    record = {**plan.info(), "digest": _digest(plan)}

    def built() -> bool:
        return cpp_build.read_record(file) == record and cpp_build.is_whole(library)

    if built():
        return CheckoutBuild(_import_from(library), library, record)
    if os.environ.get("TORCH_EXT_JIT") == "0":
        raise BuildError(
            "torch_ext: this is a checkout that has not been compiled, and TORCH_EXT_JIT=0 forbids "
            "to do so at import. Run `make build` or `pip install --no-build-isolation .` in "
            f"{csrc.parent}, or unset TORCH_EXT_JIT"
        )
    try:
        with _locked(folder):
            if built():  # another process compiled it meanwhile
                return CheckoutBuild(_import_from(library), library, record)
            file.unlink(missing_ok=True)
            if not cpp_build.is_whole(library):
                library.unlink(missing_ok=True)  # or ninja would take it for the newest
            with _fresh_or_finished(folder):
                module = _compile(plan, folder)
                cpp_build.write_record(file, record)
    except OSError as error:
        raise BuildError(
            f"torch_ext: compiling it takes a folder that can be written, and {folder} cannot: "
            f"{error}. Set TORCH_EXTENSIONS_DIR to another folder, or run `make build` or "
            f"`pip install --no-build-isolation .` in {csrc.parent}"
        ) from error
    return CheckoutBuild(module, library, record)
