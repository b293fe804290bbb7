"""How the C++ side is compiled from Python: by setup.py, and by checkout_build.py at import.

``setup.py`` loads this file by its path, before the package can be imported: it imports nothing of
the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BUILD_INFO = "build_info.json"
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


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release(version).split("."))


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def torch_cpp_extension() -> ModuleType:
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


def _has_gpu() -> bool:
    """As ``torch.cuda.is_available()``, but through NVML where it can: initialised CUDA, after an
    import that does nothing else with it, would break the processes that the caller forks."""
    return torch.cuda.device_count() > 0


def _cutlass_headers() -> tuple[str, str]:
    """The folder that holds ``cute/`` and ``cutlass/``, or "", and its version, or "none"."""
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
            return str(folder), version
    return "", version


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


def _cuda_request() -> str:
    """The variable that asks for CUDA, as ``NAME=1``; "TORCH_EXT_CUDA=0" where that forbids it;
    "" where nobody has asked."""
    wish = os.environ.get("TORCH_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"torch_ext: TORCH_EXT_CUDA takes 0 or 1, got {wish!r}")
    if wish:
        return f"TORCH_EXT_CUDA={wish}"
    # The name that other extensions of torch know; any other value of it asks for nothing there.
    return "FORCE_CUDA=1" if os.environ.get("FORCE_CUDA") == "1" else ""


def choose_cuda(csrc: Path) -> CudaChoice:
    """On where torch has CUDA, the machine has a GPU, and nvcc and CUTLASS fit.

    ``TORCH_EXT_CUDA=0`` turns it off. ``TORCH_EXT_CUDA=1`` or ``FORCE_CUDA=1`` asks for it: no GPU
    is needed then, and anything else that is missing is an error.

    Raises:
        BuildError: CUDA was asked for and cannot be had.
    """
    request = _cuda_request()
    if request == "TORCH_EXT_CUDA=0":
        return CudaChoice(False, request)

    def missing(reason: str) -> CudaChoice:
        if request:
            raise BuildError(f"torch_ext: {request}, but {reason}")
        return CudaChoice(False, reason)

    if not _lines(csrc / "sources_cuda.txt"):
        return missing("this version has no CUDA sources")
    if torch.version.cuda is None:
        return missing(f"torch {torch.__version__} is built without CUDA")
    if not request and not _has_gpu():
        return CudaChoice(False, "no GPU is here; TORCH_EXT_CUDA=1 compiles for one all the same")
    cuda_home = torch_cpp_extension().CUDA_HOME
    nvcc = _nvcc_release(cuda_home) if cuda_home else None
    if nvcc is None:
        return missing("no nvcc was found: put it on PATH or set CUDA_HOME")
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return missing(
            f"nvcc {nvcc} in {cuda_home} cannot compile for a torch built with CUDA "
            f"{torch.version.cuda}: the major versions differ"
        )
    cutlass, version = _cutlass_headers()
    if not cutlass:
        oldest = ".".join(str(number) for number in OLDEST_CUTLASS)
        return missing(
            f"the CUDA kernels take the headers of CUTLASS {oldest} or newer, got {version}: "
            f"`pip install 'nvidia-cutlass>={oldest}'`, or set CUTLASS_PATH to a checkout of it"
        )
    default = CUDA_ARCHITECTURES if numbers(nvcc) >= (12, 8, 0) else CUDA_ARCHITECTURES_BEFORE_12_8
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    return CudaChoice(True, f"nvcc {nvcc} in {cuda_home}", architectures, cutlass)


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

    def info(self) -> dict[str, Any]:
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
        BuildError: torch is too old, or CUDA was asked for and cannot be had.
    """
    if numbers(torch.__version__)[:2] < OLDEST_TORCH:
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
    standard = ["-std=c++20"] if numbers(torch.__version__)[:2] <= NEWEST_TORCH_TESTED else []
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


def read_record(file: Path) -> dict[str, Any] | None:
    """What a build wrote about itself at its end; None where it is not there or not whole."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and {"version", "torch_version"} <= record.keys()
    return record if whole else None


def write_record(file: Path, record: dict[str, Any]) -> None:
    """All of it or nothing, whenever the process is killed."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with open(unfinished, "w") as stream:
        stream.write(json.dumps(record, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def is_whole(library: Path) -> bool:
    """Whether a shared library reaches to its end, which an ELF file's header tells: to load one
    that was cut kills the process (SIGBUS)."""
    try:
        with open(library, "rb") as stream:
            header = stream.read(64)
            size = os.fstat(stream.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    # The table of sections comes last: e_shoff, then e_shentsize and e_shnum.
    (table,) = struct.unpack_from("=Q", header, 40)
    entry, count = struct.unpack_from("=HH", header, 58)
    return size >= table + entry * count


def limit_jobs() -> None:
    """Sets ``MAX_JOBS``, which torch's builds honour, to what cores and memory allow, if unset."""
    if not os.environ.get("MAX_JOBS"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0))
        os.environ["MAX_JOBS"] = str(max(1, min(cores, int(memory / BYTES_PER_JOB))))
