"""How the C++ side is compiled from Python: by setup.py, and at import in a bare checkout.

``setup.py`` loads this file by its path, before the package can be imported: it imports nothing of
the package.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

BUILD_INFO = "build_info.json"
MODULE = "torch_ext_C"
OLDEST_TORCH = (2, 11)
OLDEST_CUTLASS = (4, 2)
NEWEST_TORCH_TESTED = (2, 15)
# What a source file with torch's headers takes to compile.
BYTES_PER_JOB = 1.6e9
# Blackwell came with CUDA 12.8; an older nvcc stops at Hopper, and its PTX serves what came later.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
CUDA_ARCHITECTURES_BEFORE_12_8 = "8.0;9.0a;9.0+PTX"


class BuildError(ImportError):
    """The library is not there and cannot be built; the message says what to do."""


def release(version: str) -> str:
    """``2.15.0`` of ``2.15.0+cu132`` or ``2.15.0.dev20261101``: what the ABI hangs on."""
    found = re.match(r"\d+\.\d+(\.\d+)?", version)
    if found is None:
        raise ValueError(f"torch_ext: not a version: {version!r}")
    return found.group() if found.group(1) else f"{found.group()}.0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release(version).split("."))


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _cpp_extension() -> ModuleType:
    """torch.utils.cpp_extension, without its warning that nvcc is there but no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torch.utils.cpp_extension")
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class CudaChoice:
    """Whether the CUDA sources are compiled, why or why not, and for which architectures."""

    on: bool
    reason: str
    architectures: str = ""  # in torch's notation
    cutlass: str = ""  # the folder of its headers


def _nvcc_release(cuda_home: str) -> str | None:
    try:
        output = subprocess.run(
            [str(Path(cuda_home) / "bin" / "nvcc"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", output)
    return found.group(1) if found else None


def _cutlass_headers() -> str:
    """The folder that holds ``cute/`` and ``cutlass/``.

    Raises:
        BuildError: there is none, or it is too old.
    """
    package = importlib.util.find_spec("cutlass_library")
    locations = package.submodule_search_locations if package is not None else None
    candidates = [Path(location) / "source" / "include" for location in locations or []]
    if os.environ.get("CUTLASS_PATH"):
        candidates.insert(0, Path(os.environ["CUTLASS_PATH"]) / "include")
    version = "none"
    for folder in candidates:
        file = folder / "cutlass" / "version.h"
        if not file.is_file():
            continue
        numbers = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR) (\d+)", file.read_text())
        version = ".".join(numbers)
        if tuple(map(int, numbers)) >= OLDEST_CUTLASS:
            return str(folder)
    oldest = ".".join(str(number) for number in OLDEST_CUTLASS)
    raise BuildError(
        f"torch_ext: the CUDA kernels take the headers of CUTLASS {oldest} or newer, got "
        f"{version}. Either `pip install 'nvidia-cutlass>={oldest}'`, or set CUTLASS_PATH to a "
        "checkout of it, or TORCH_EXT_CUDA=0 to build without CUDA"
    )


def _gencode_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list in torch's notation."""
    flags = []
    for architecture in architectures.replace(" ", ";").split(";"):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if found is None or int(found.group(1)) < 8:
            raise BuildError(
                "torch_ext: TORCH_CUDA_ARCH_LIST takes numbers from 8.0 on, as in "
                f"8.0;9.0a;12.0+PTX, got {architecture!r}"
            )
        number = found.group(1) + found.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def choose_cuda(csrc: Path) -> CudaChoice:
    """On where torch has CUDA, an nvcc of the same major version is found, and there are sources.

    ``TORCH_EXT_CUDA=0`` turns it off and ``TORCH_EXT_CUDA=1`` makes what is missing an error. A GPU
    is not asked for: machines that build seldom have one.

    Raises:
        BuildError: ``TORCH_EXT_CUDA=1`` cannot be had, or CUTLASS is missing: pip could bring it.
    """
    wish = os.environ.get("TORCH_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"torch_ext: TORCH_EXT_CUDA takes 0 or 1, got {wish!r}")
    if wish == "0":
        return CudaChoice(False, "TORCH_EXT_CUDA=0")

    def missing(reason: str) -> CudaChoice:
        if wish == "1":
            raise BuildError(f"torch_ext: TORCH_EXT_CUDA=1, but {reason}")
        return CudaChoice(False, reason)

    if not _lines(csrc / "sources_cuda.txt"):
        return missing("this version has no CUDA sources")
    if torch.version.cuda is None:
        return missing(f"torch {torch.__version__} is built without CUDA")
    cuda_home = _cpp_extension().CUDA_HOME
    nvcc = _nvcc_release(cuda_home) if cuda_home else None
    if nvcc is None:
        return missing("no nvcc was found: put it on PATH or set CUDA_HOME")
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return missing(
            f"nvcc {nvcc} in {cuda_home} cannot compile for a torch built with CUDA "
            f"{torch.version.cuda}: the major versions differ"
        )
    default = CUDA_ARCHITECTURES if _numbers(nvcc) >= (12, 8, 0) else CUDA_ARCHITECTURES_BEFORE_12_8
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    return CudaChoice(True, f"nvcc {nvcc} in {cuda_home}", architectures, _cutlass_headers())


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides what is compiled and how."""

    csrc: Path
    version: str
    sources: list[Path]
    include_dirs: list[Path]
    standard: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    libraries: list[str]
    cuda: CudaChoice

    @property
    def module_source(self) -> Path:
        """The pybind11 module's, which is not part of the library."""
        return self.csrc / "ops" / "python_module.cpp"

    def info(self) -> dict[str, object]:
        """What ``build_info.json`` beside the library says."""
        return {
            "version": self.version,
            "torch_version": release(torch.__version__),
            "cuda_version": torch.version.cuda if self.cuda.on else None,
            "cuda_architectures": self.cuda.architectures,
            "flags": " ".join(self.cxx_flags),
        }

    def describe(self) -> str:
        cuda = f"with CUDA ({self.cuda.reason}; {self.cuda.architectures})"
        if not self.cuda.on:
            cuda = f"without CUDA ({self.cuda.reason})"
        return f"torch_ext {self.version} for torch {torch.__version__}, {cuda}"


def plan_build(csrc: Path) -> BuildPlan:
    """Reads the source lists under ``csrc`` and decides about CUDA.

    Raises:
        BuildError: torch is too old, or ``TORCH_EXT_CUDA=1`` cannot be had.
    """
    if _numbers(torch.__version__)[:2] < OLDEST_TORCH:
        oldest = ".".join(str(number) for number in OLDEST_TORCH)
        raise BuildError(f"torch_ext: takes torch {oldest} or newer, got {torch.__version__}")
    found = re.search(
        r'TORCH_EXT_VERSION "(.+)"', (csrc / "include" / "torch_ext" / "version.h").read_text()
    )
    assert found is not None
    cuda = choose_cuda(csrc)
    lists = ["sources_cpu.txt"] + (["sources_cuda.txt"] if cuda.on else [])
    cxx_flags = _lines(csrc / "compile_flags.txt")
    # A newer torch may need a later standard than C++20, and asks for it itself.
    standard = ["-std=c++20"] if _numbers(torch.__version__)[:2] <= NEWEST_TORCH_TESTED else []
    nvcc_flags = []
    if cuda.on:
        nvcc_flags = [
            *_lines(csrc / "nvcc_flags.txt"),
            *_gencode_flags(cuda.architectures),
            f"-isystem={cuda.cutlass}",
        ]
    return BuildPlan(
        csrc=csrc,
        version=found.group(1),
        sources=[csrc / line for name in lists for line in _lines(csrc / name)],
        include_dirs=[csrc / "include", csrc],
        standard=standard,
        cxx_flags=cxx_flags,
        nvcc_flags=nvcc_flags,
        libraries=["cublasLt"] if cuda.on else [],
        cuda=cuda,
    )


def limit_jobs() -> None:
    """Sets ``MAX_JOBS``, which torch's builds honour, to what cores and memory allow, if unset."""
    if not os.environ.get("MAX_JOBS"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0))
        os.environ["MAX_JOBS"] = str(max(1, min(cores, int(memory / BYTES_PER_JOB))))


def _digest(plan: BuildPlan) -> str:
    """Of every file under csrc and of the flags: what the compiled module is made of."""
    digest = hashlib.sha256(repr((plan.info(), plan.nvcc_flags)).encode())
    for file in sorted(path for path in plan.csrc.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(plan.csrc)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _build_folder(plan: BuildPlan) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or _cpp_extension().get_default_build_root()
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
    return Path(root) / f"torch_ext-torch{release(torch.__version__)}-{digest}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "torch_ext.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # torch's own lock is a file that a killed build leaves behind, and then waits for for ever.
        (folder / "lock").unlink(missing_ok=True)
        yield


def _import_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(plan: BuildPlan, folder: Path, say: Callable[[str], None]) -> ModuleType:
    cpp_extension = _cpp_extension()
    if not cpp_extension.is_ninja_available():
        raise BuildError("torch_ext: compiling it takes ninja: pip install ninja")
    limit_jobs()
    say(
        f"torch_ext: compiling {plan.describe()}, once, in a few minutes; it is kept in {folder}",
    )
    start = time.monotonic()
    torch_numbers = _numbers(torch.__version__)[:2]
    module = cpp_extension.load(
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
    say(f"torch_ext: compiled in {time.monotonic() - start:.0f} s")
    return module


def load_checkout(csrc: Path) -> tuple[ModuleType, Path]:
    """Compiles the library of a bare checkout, or takes what an earlier import compiled.

    Returns:
        The module that is ``torch_ext._C``, with the operators registered, and its file.

    Raises:
        BuildError: ``TORCH_EXT_JIT=0``, or a tool is missing.
        RuntimeError: the compiler failed; the message has its output.
    """
    try:
        plan = plan_build(csrc)
        folder = _build_folder(plan)
    except ModuleNotFoundError as error:
        raise BuildError(
            f"torch_ext: compiling it takes {error.name}: pip install {error.name}"
        ) from error
    library = folder / f"{MODULE}.so"
    info_file = folder / BUILD_INFO
    info = {**plan.info(), "digest": _digest(plan)}

    def up_to_date() -> bool:
        return (
            library.is_file() and info_file.is_file() and json.loads(info_file.read_text()) == info
        )

    if up_to_date():
        return _import_from(library), library
    if os.environ.get("TORCH_EXT_JIT") == "0":
        raise BuildError(
            "torch_ext: this is a checkout that has not been compiled, and TORCH_EXT_JIT=0 forbids "
            "to do so at import. Run `make build` or `pip install --no-build-isolation .` in "
            f"{csrc.parent}, or unset TORCH_EXT_JIT"
        )
    with _locked(folder):
        if up_to_date():  # another process compiled it meanwhile
            return _import_from(library), library
        info_file.unlink(missing_ok=True)
        module = _compile(plan, folder, lambda line: print(line, file=sys.stderr, flush=True))
        info_file.write_text(json.dumps(info, indent=2) + "\n")
    return module, library
