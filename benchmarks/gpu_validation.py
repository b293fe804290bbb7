"""All that wants a GPU, in one command of under ten minutes: build, tests, sanitizers, figures.

    python benchmarks/gpu_validation.py [--wheels FOLDER] [--googletest FOLDER] [--steps build,...]

Builds in place for the GPU of this machine, runs the tests of that device, memcheck and racecheck
of compute-sanitizer on small shapes, and the benchmarks against torch. Ends with a short table and
writes benchmarks/results/gpu_DEVICE_DATE.json. Nothing is fetched: on a machine without a network,
--wheels is a folder with what it lacks (nvidia-cutlass, expecttest, ninja), --googletest one that
has usr/include/gtest (scripts/googletest_prefix.sh fills one). --dry-run prints the commands, on
any machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_validation"
# In their order. A step that takes longer is ended and counts as failed, as all do after the last
# second of --minutes.
LIMITS = {
    "build": 300,
    "googletest": 150,
    "pytest": 150,
    "mini_batches": 90,
    "attention": 180,
    "sanitizer": 240,
}
# What runs under the sanitizers: seconds there are minutes.
SANITIZED = (
    "*.Strides/cuda:*.ScaleOfEveryDtype/cuda:*.SmallStridedShapes/cuda:*.EveryOption/cuda:"
    "EachIsa/EmbeddingGradient.*/cuda:Cuda/CudaEveryKernel.*/cuda"
)
# Test processes at a time: each has a CUDA context of its own.
PYTEST_PROCESSES = 6


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
        self.end = time.monotonic() + options.minutes * 60
        self.environment = dict(os.environ)
        self.log = BUILD / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        self.site = BUILD / "site"
        folders = [python_folder(), str(self.site / "bin"), self.environment.get("PATH", "")]
        folders += tool_folders()
        self.environment["PATH"] = os.pathsep.join(folders)
        self.environment["MAX_JOBS"] = str(len(os.sched_getaffinity(0)))
        self.environment["PYTHONPATH"] = str(ROOT)
        self.environment["TORCH_EXT_CUDA"] = "1"
        self.environment["TORCH_CUDA_ARCH_LIST"] = options.architecture

    def run(self, name: str, command: list[str], limit: float, **variables: str) -> str:
        """Output of a command; its own log file keeps all of it."""
        if self.options.dry_run:
            words = [f"{key}={value}" for key, value in variables.items()] + command
            print(f"{name}: {shlex.join(words)}")
            return ""
        left = self.end - time.monotonic()
        if left < 1.0:
            raise StepFailed(f"not begun: the {self.options.minutes:g} minutes are over")
        limit = min(limit, left)
        log = self.log / f"{name}.log"
        ended = False
        with (
            log.open("w") as output,
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                ended = True
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        text = log.read_text(errors="replace")
        if ended:
            raise StepFailed(f"ended after {limit:.0f} s\n{_tail(text)}")
        if process.returncode != 0:
            raise StepFailed(f"exit status {process.returncode}\n{_tail(text)}")
        return text

    def side_by_side(self, run: Callable[[T], str], keys: list[T]) -> dict[T, str]:
        """run(key) of all at a time. Fails with everything that failed."""
        with ThreadPoolExecutor(1 if self.options.dry_run else len(keys)) as pool:
            pending = {key: pool.submit(run, key) for key in keys}
        failed = [str(error) for future in pending.values() if (error := future.exception())]
        if failed:
            raise StepFailed("\n".join(failed))
        return {key: future.result() for key, future in pending.items()}

    def build(self) -> tuple[str, list[str]]:
        """Wheels, then the library and its Python module in place."""
        if self.options.wheels is not None:
            wheels = [str(wheel) for wheel in sorted(self.options.wheels.glob("*.whl"))]
            if not wheels and not self.options.dry_run:
                raise StepFailed(f"there are no wheels in {self.options.wheels}")
            pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
            self.run("wheels", [*pip, "--upgrade", "--target", str(self.site), *wheels], 60)
            self.environment["PYTHONPATH"] += f"{os.pathsep}{self.site}"
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
        ran = _last_match(r"\[==========\] (.*) ran", output)
        if ran.startswith("0 tests"):
            raise StepFailed("no test ran on the GPU: does this process see it?")
        return ran, []

    def pytest(self) -> tuple[str, list[str]]:
        """Tests that have a variant for the device, a process for every few files."""
        shares = [files for files in shared_out(device_tests(), PYTEST_PROCESSES) if files]
        common = ["-q", "-k", "cuda", "--maxfail=20", "-p", "no:cacheprovider"]

        def run(number: int) -> str:
            command = [sys.executable, "-m", "pytest", *common, *shares[number]]
            return self.run(f"pytest_{number}", command, LIMITS["pytest"], OMP_NUM_THREADS="2")

        outputs = self.side_by_side(run, list(range(len(shares)))).values()
        passed = sum(int(_last_match(r"(\d+) passed", output, "0")) for output in outputs)
        return f"{passed} passed in {len(shares)} processes", []

    def sanitizer(self) -> tuple[str, list[str]]:
        """memcheck with an allocation for each tensor, and racecheck."""
        tool = shutil.which("compute-sanitizer", path=self.environment["PATH"])
        if tool is None:
            if not self.options.dry_run:
                raise StepFailed("there is no compute-sanitizer: it is part of the CUDA toolkit")
            tool = "compute-sanitizer"
        tests = [str(BUILD / "kernels" / "kernel_tests"), "--gtest_brief=1"]
        tests.append(f"--gtest_filter={SANITIZED}")

        def run(check: str) -> str:
            command = [tool, "--tool", check, "--error-exitcode", "9", *tests]
            limit = LIMITS["sanitizer"]
            return self.run(f"sanitizer_{check}", command, limit, TORCH_EXT_TEST_SEPARATE="1")

        found = self.side_by_side(run, ["memcheck", "racecheck"])
        return "; ".join(
            f"{check}: {_last_match(r'SUMMARY: (.*)', output)}" for check, output in found.items()
        ), []

    def mini_batches(self) -> tuple[str, list[str]]:
        return self._benchmark("mini_batches", "gpu_mini_batches.py")

    def attention(self) -> tuple[str, list[str]]:
        return self._benchmark("attention", "gpu_attention.py")

    def _benchmark(self, name: str, script: str) -> tuple[str, list[str]]:
        file = BUILD / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, f"benchmarks/{script}", "--json", str(file)]
        # It ends by itself, with what it has, before it is ended.
        seconds = min(LIMITS[name], self.end - time.monotonic()) - 20
        command += ["--seconds", f"{max(seconds, 1):.0f}"]
        if self.options.quick:
            command.append("--quick")
        lines = self.run(name, command, LIMITS[name]).splitlines() or [""]
        return lines[-1], lines[:-1]

    def steps(self) -> dict[str, Callable[[], tuple[str, list[str]]]]:
        return {name: getattr(self, name) for name in LIMITS}


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _last_match(pattern: str, text: str, otherwise: str = "nothing was said") -> str:
    found = re.findall(pattern, text)
    return found[-1] if found else otherwise


def take_step(name: str, step: Callable[[], tuple[str, list[str]]]) -> Step:
    """Runs a step; what it raises is its summary."""
    start = time.monotonic()
    try:
        summary, details = step()
        return Step(name, True, time.monotonic() - start, summary, details)
    except (StepFailed, OSError) as error:
        first, *rest = str(error).splitlines() or [""]
        return Step(name, False, time.monotonic() - start, first, rest)


def python_folder() -> str:
    """One in which this interpreter is called python, for the scripts."""
    own = Path(sys.executable).parent
    if (own / "python").exists():
        return str(own)
    folder = BUILD / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    script.chmod(0o755)
    return str(folder)


def tool_folders() -> list[str]:
    """Where nvcc and compute-sanitizer may be, behind PATH: the toolkit, or Python packages."""
    folders = [Path("/usr/local/cuda/bin")]
    for entry in sys.path:
        folders += sorted(Path(entry, "nvidia").glob("*/bin"))
    return [str(folder) for folder in folders if folder.is_dir()]


def device_tests() -> list[str]:
    """The files of the Python tests that name the device fixture."""
    tests = sorted((ROOT / "tests" / "python").glob("test_*.py"))
    uses = re.compile(r"""usefixtures\(.*"device"|^ *def test_\w+\([^)]*\bdevice\b""", re.MULTILINE)
    return [str(test.relative_to(ROOT)) for test in tests if uses.search(test.read_text())]


def shared_out(files: list[str], shares: int) -> list[list[str]]:
    """The files in so many parts of about the same size."""
    parts: list[list[str]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for file in sorted(files, key=lambda file: -(ROOT / file).stat().st_size):
        least = sizes.index(min(sizes))
        parts[least].append(file)
        sizes[least] += (ROOT / file).stat().st_size
    return parts


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
        [
            sys.executable,
            "-c",
            "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if versions[2] != "True":
        raise ValueError(f"torch {versions[0]} (CUDA: {versions[1]}) cannot use {name}")
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
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    options.steps = options.steps.split(",")
    unknown = [name for name in options.steps if name not in LIMITS]
    if unknown:
        parser.error(f"--steps takes {', '.join(LIMITS)}, got {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse_options()
    if options.dry_run:
        options.architecture = options.architecture or "9.0a"
        validation = Validation(options)
        taken = [take_step(name, validation.steps()[name]) for name in options.steps]
        for done in taken:
            print(f"{done.name}: {done.summary}" if not done.ok else f"{done.name}: would run")
        return 0 if all(done.ok for done in taken) else 1
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
