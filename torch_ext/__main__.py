"""``python -m torch_ext``: which version this is, what it was built for, and what it uses here."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

import torch_ext
from torch_ext import _C
from torch_ext.native_library import loaded


def _device_architectures() -> list[str]:
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
    return devices


def report() -> dict[str, Any]:
    """Everything that ``python -m torch_ext --json`` prints."""
    info = loaded.build_info
    return {
        "torch_ext": torch_ext.__version__,
        "torch_built_for": info["torch_version"],
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": _C.cpu_capability(),
        "cpu_capability_supported": _C.supported_cpu_capability(),
        "cpu_capability_limit": os.environ.get("TORCH_EXT_CPU_CAPABILITY"),
        "threads": torch.get_num_threads(),
        "cuda_version": info["cuda_version"],
        "cuda_architectures": info["cuda_architectures"],
        "cuda_devices": _device_architectures(),
        "enabled": torch_ext.is_enabled(),
        "cuda_enabled": _C.is_cuda_enabled(),
        "compiler_flags": info["flags"],
        "compiled_at_import": loaded.compiled_at_import,
        "package": os.path.dirname(os.path.abspath(torch_ext.__file__)),
        "library": str(loaded.library),
        "cmake_prefix_path": torch_ext.cmake_prefix_path
        if os.path.isdir(torch_ext.cmake_prefix_path)
        else None,
    }


def _drop_in(facts: dict[str, Any]) -> str:
    if not facts["enabled"]:
        return "not enabled: torch_ext.enable()"
    if facts["cuda_enabled"]:
        return "enabled, for CUDA tensors too"
    return "enabled; CUDA tensors are left to torch"


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    limit = facts["cpu_capability_limit"]
    limited = f", TORCH_EXT_CPU_CAPABILITY={limit}" if limit is not None else ""
    supported = f"this CPU has {facts['cpu_capability_supported']}"
    cuda = "not built"
    if facts["cuda_version"] is not None:
        devices = ", ".join(facts["cuda_devices"]) or "no device here"
        cuda = f"{facts['cuda_version']} for {facts['cuda_architectures']}; {devices}"
    how = "compiled at import, cached" if facts["compiled_at_import"] else "prebuilt"
    return [
        ("torch_ext", facts["torch_ext"]),
        ("torch", f"{facts['torch_running']} (built for {facts['torch_built_for']})"),
        ("Python", facts["python"]),
        ("instruction set", f"{facts['cpu_capability']} ({supported}{limited})"),
        ("threads", str(facts["threads"])),
        ("CUDA", cuda),
        ("drop-in", _drop_in(facts)),
        ("library", f"{facts['library']} ({how})"),
        ("CMake package", facts["cmake_prefix_path"] or "none: pip install, or cmake --install"),
        ("compiler flags", facts["compiler_flags"]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_ext",
        description="Version, build and instruction set of torch_ext on this machine.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(argv)
    facts = report()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    lines = _lines(facts)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
