"""All that wants a GPU, in one command of under ten minutes: build, tests, sanitizers, figures.

    python benchmarks/gpu_validation.py [--wheels FOLDER] [--googletest FOLDER] [--steps build,...]

Builds in place for the GPU of this machine, runs the tests of that device, memcheck and racecheck
of compute-sanitizer on small shapes, and the benchmarks against torch. Ends with a short table and
writes benchmarks/results/gpu_DEVICE_DATE.json. Nothing is fetched: on a machine without a network,
--wheels is a folder with what it lacks (nvidia-cutlass, expecttest), --googletest one that has
usr/include/gtest (scripts/googletest_prefix.sh fills one).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_validation"
# Of the ten minutes; a step that takes longer is ended and counts as failed.
LIMITS = {
    "build": 300,
    "googletest": 150,
    "pytest": 150,
    "sanitizer": 120,
    "mini_batches": 90,
    "attention": 180,
}
# What runs under the sanitizers: seconds there are minutes.
SANITIZED = (
    "*.Strides/cuda:*.ScaleOfEveryDtype/cuda:*.SmallStridedShapes/cuda:*.EveryOption/cuda:"
    "EachIsa/EmbeddingGradient.*/cuda"
)


@dataclass
class Step:
    """What a step did."""

    name: str
    ok: bool
    seconds: float
    summary: str
    details: list[str] = field(default_factory=list)


class StepFailed(Exception):
    """The command's last lines."""


class Validation:
    """The steps, sharing folders and an environment."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.environment = dict(os.environ)
        self.log = BUILD / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        folders = [str(Path(sys.executable).parent), self.environment.get("PATH", "")]
        self.environment["PATH"] = os.pathsep.join(folders)
        self.environment["MAX_JOBS"] = str(len(os.sched_getaffinity(0)))
        self.environment["PYTHONPATH"] = str(ROOT)
        self.environment["TORCH_EXT_CUDA"] = "1"
        self.environment["TORCH_CUDA_ARCH_LIST"] = options.architecture

    def run(self, name: str, command: list[str], limit: float, **variables: str) -> str:
        """Output of a command; its own log file keeps all of it."""
        log = self.log / f"{name}.log"
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**self.environment, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            text = output.decode(errors="replace") if isinstance(output, bytes) else output
            log.write_text(text)
            raise StepFailed(f"ended after {limit:.0f} s\n{_tail(text)}") from error
        log.write_text(done.stdout)
        if done.returncode != 0:
            raise StepFailed(f"exit status {done.returncode}\n{_tail(done.stdout)}")
        return done.stdout

    def build(self) -> tuple[str, list[str]]:
        """Wheels, then the library and its Python module in place."""
        if self.options.wheels is not None:
            site = BUILD / "site"
            wheels = [str(wheel) for wheel in sorted(self.options.wheels.glob("*.whl"))]
            pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
            self.run("wheels", [*pip, "--upgrade", "--target", str(site), *wheels], 60)
            self.environment["PYTHONPATH"] += f"{os.pathsep}{site}"
        output = self.run(
            "build",
            ["bash", "scripts/build_library.sh", "-DCMAKE_BUILD_TYPE=Release"],
            LIMITS["build"],
            BUILD=str(BUILD / "library"),
        )
        return next((line for line in output.splitlines() if "torch_ext" in line), ""), []

    def googletest(self) -> tuple[str, list[str]]:
        """The kernels' own tests, the columns that run on the GPU."""
        folder = BUILD / "kernels"
        prefix = self.options.googletest
        configure = ["cmake", "-S", "tests/kernels", "-B", str(folder), "-G", "Ninja"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", "-DTORCH_EXT_CUDA_TESTS=ON"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        if prefix is not None:
            configure += [f"-DCMAKE_PREFIX_PATH={prefix.resolve() / 'usr'}"]
        self.run("googletest_configure", configure, 60)
        jobs = self.environment["MAX_JOBS"]
        build = ["cmake", "--build", str(folder), "--parallel", jobs]
        self.run("googletest_build", build, LIMITS["googletest"])
        tests = [str(folder / "kernel_tests"), "--gtest_brief=1", "--gtest_filter=*/cuda"]
        output = self.run("googletest", tests, LIMITS["googletest"])
        return _last_match(r"\[==========\] (.*) ran", output), []

    def pytest(self) -> tuple[str, list[str]]:
        """Tests that have a variant for the device."""
        tests = ["tests/python", "-q", "-k", "cuda", "--maxfail=20", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *tests]
        output = self.run("pytest", command, LIMITS["pytest"])
        return _last_match(r"(\d+ passed.*)", output), []

    def sanitizer(self) -> tuple[str, list[str]]:
        """memcheck with an allocation for each tensor, and racecheck."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        tests = [str(BUILD / "kernels" / "kernel_tests"), "--gtest_brief=1"]
        tests.append(f"--gtest_filter={SANITIZED}")
        found = []
        for check in ("memcheck", "racecheck"):
            output = self.run(
                f"sanitizer_{check}",
                [tool, "--tool", check, "--error-exitcode", "9", *tests],
                LIMITS["sanitizer"] / 2,
                TORCH_EXT_TEST_SEPARATE="1",
            )
            found.append(f"{check}: {_last_match(r'SUMMARY: (.*)', output)}")
        return "; ".join(found), []

    def mini_batches(self) -> tuple[str, list[str]]:
        return self._benchmark("mini_batches", "gpu_mini_batches.py")

    def attention(self) -> tuple[str, list[str]]:
        return self._benchmark("attention", "gpu_attention.py")

    def _benchmark(self, name: str, script: str) -> tuple[str, list[str]]:
        command = [sys.executable, f"benchmarks/{script}", "--json", str(BUILD / f"{name}.json")]
        if self.options.quick:
            command.append("--quick")
        output = self.run(name, command, LIMITS[name])
        lines = output.splitlines()
        return lines[-1], lines[:-1]

    def steps(self) -> dict[str, Callable[[], tuple[str, list[str]]]]:
        return {name: getattr(self, name) for name in LIMITS}


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _last_match(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    return found[-1] if found else "nothing was said"


def take_step(name: str, step: Callable[[], tuple[str, list[str]]]) -> Step:
    """Runs a step; what it raises is its summary."""
    start = time.monotonic()
    try:
        summary, details = step()
        return Step(name, True, time.monotonic() - start, summary, details)
    except (StepFailed, OSError) as error:
        first, *rest = str(error).splitlines() or [""]
        return Step(name, False, time.monotonic() - start, first, rest)


def describe_machine() -> dict[str, str]:
    """The GPU and what drives it, as their own tools say."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap"]
    name, driver, memory, capability = (
        subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        .stdout.splitlines()[0]
        .split(", ")
    )
    versions = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {
        "device": name,
        "driver": driver,
        "memory": memory,
        "compute_capability": capability,
        "torch": versions[0],
        "torch_cuda": versions[1],
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }


def architecture_of(capability: str) -> str:
    """Hopper's own instructions are in 9.0a alone."""
    return "9.0a" if capability == "9.0" else capability


def write_results(machine: dict[str, str], steps: list[Step], folder: Path) -> Path:
    """All that was found out, in a file named after device and date."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    content: dict[str, object] = {"machine": machine, "steps": [asdict(step) for step in steps]}
    for name in ("mini_batches", "attention"):
        file = BUILD / f"{name}.json"
        if file.is_file():
            content[name] = json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{device}_{machine['date']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--googletest", type=Path, help="folder that has usr/include/gtest")
    parser.add_argument("--steps", default=",".join(LIMITS), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--architecture", help="for nvcc; default: the GPU's")
    parser.add_argument("--quick", action="store_true", help="benchmarks on tiny shapes")
    options = parser.parse_args(arguments)
    options.steps = options.steps.split(",")
    unknown = [name for name in options.steps if name not in LIMITS]
    if unknown:
        parser.error(f"--steps takes {', '.join(LIMITS)}, got {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse_options()
    try:
        machine = describe_machine()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        print(f"gpu_validation: takes a machine with an NVIDIA GPU: {error}", file=sys.stderr)
        return 2
    options.architecture = options.architecture or architecture_of(machine["compute_capability"])
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    validation = Validation(options)
    steps = []
    for name, step in validation.steps().items():
        if name not in options.steps:
            continue
        steps.append(take_step(name, step))
        print(f"\n== {name}: {'ok' if steps[-1].ok else 'FAILED'}, {steps[-1].seconds:.0f} s")
        print("\n".join([steps[-1].summary, *steps[-1].details]), flush=True)
    path = write_results(machine, steps, options.output)
    print()
    for done in steps:
        print(
            f"{done.name:14}{'ok' if done.ok else 'FAILED':8}{done.seconds:5.0f} s  {done.summary}"
        )
    print(f"{sum(step.seconds for step in steps):.0f} s in all; written to {path}")
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
