"""What the figures were measured on, and what that machine can do at most."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from environment import Environment, Peaks

import torch_ext

_KERNELS = Path(__file__).resolve().parent / "kernels"


def measure_peaks(threads: int, capability: str) -> Peaks | None:
    """Compiles and runs kernels/machine_peak; None, with a line saying why, without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler found: no fractions of peak")
        return None
    with tempfile.TemporaryDirectory(prefix="torch_ext_peak_") as folder:
        program = str(Path(folder) / "machine_peak")
        sources = [str(_KERNELS / name) for name in ("machine_peak.cpp", "machine_peak_main.cpp")]
        command = [*compiler.split(), "-std=c++20", "-O3", "-pthread", *sources, "-o", program]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            print(f"kernels/machine_peak.cpp did not compile: no fractions of peak\n{built.stderr}")
            return None
        run = subprocess.run(
            [program, str(threads), capability], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"no fractions of peak: {run.stderr.strip()}")
            return None
        return Peaks(**json.loads(run.stdout))


def processor_name(device: torch.device) -> str:
    """As the system calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device, with_peaks: bool) -> Environment:
    """The environment of this process as it is now."""
    threads = torch.get_num_threads()
    capability = torch_ext._C.cpu_capability() if device.type == "cpu" else "cuda"
    peaks = measure_peaks(threads, capability) if with_peaks and device.type == "cpu" else None
    return Environment(
        processor=processor_name(device),
        capability=capability,
        threads=threads,
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        torch_ext=torch_ext.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        peaks=peaks,
    )
