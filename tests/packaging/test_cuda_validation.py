"""benchmarks/gpu_validation.py where there is no GPU: what it would run, and how it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout_copy import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_validation.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_validation


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def dry_run() -> str:
    done = _run("--dry-run", "--wheels", str(ROOT / "docs"), "--googletest", str(ROOT / "docs"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_step_says_what_it_would_run(dry_run: str) -> None:
    for step in gpu_validation.LIMITS:
        assert f"{step}: would run" in dry_run
    for command in (
        "wheels: ",
        "build: BUILD=",
        "googletest_configure: cmake -S tests/kernels",
        f"-DCMAKE_PREFIX_PATH={ROOT / 'docs' / 'usr'}",
        "googletest_build: cmake --build",
        "pytest_0: OMP_NUM_THREADS=2",
        "--tool memcheck --error-exitcode 9",
        "--tool racecheck --error-exitcode 9",
    ):
        assert command in dry_run, command


def test_the_files_that_it_names_are_there(dry_run: str) -> None:
    named = re.findall(r"\b(?:scripts|benchmarks|tests)/[\w/]+\.(?:sh|py)\b", dry_run)
    assert {"scripts/build_library.sh", "benchmarks/gpu_attention.py"} <= set(named)
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_benchmarks_take_the_options_that_they_are_given(dry_run: str) -> None:
    for name in ("gpu_attention", "gpu_mini_batches"):
        line = re.search(rf"benchmarks/{name}\.py (.*)", dry_run)
        assert line is not None
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        for option in re.findall(r"--[a-z-]+", line.group(1)):
            assert f'add_argument("{option}"' in source, option


def test_the_sanitizers_get_tests_that_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests" / "kernels").glob("*.cpp"))
    for pattern in gpu_validation.SANITIZED.split(":"):
        suite, test = pattern.split("/cuda")[0].rsplit(".", 1)
        suite = suite.split("/")[-1]
        suite = r"\w+" if suite == "*" else suite
        test = r"\w+" if test == "*" else test
        assert re.search(rf"TEST_P\({suite}, {test}\)", sources), pattern


def test_tests_of_the_device_are_shared_out_once_each() -> None:
    files = gpu_validation.device_tests()
    assert "tests/python/test_grad_accumulate.py" in files
    assert "tests/python/test_timm.py" not in files
    parts = gpu_validation.shared_out(files, 4)
    assert sorted(file for part in parts for file in part) == files
    assert all(parts) or len(files) < 4


def test_when_the_minutes_are_over_steps_fail_without_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path)
    options = gpu_validation.parse_options(["--architecture", "9.0a", "--minutes", "0"])
    validation = gpu_validation.Validation(options)
    with pytest.raises(gpu_validation.StepFailed, match="not begun: the 0 minutes are over"):
        validation.run("echo", ["echo", "said"], 10)
    assert not (tmp_path / "log" / "echo.log").exists()


def test_what_takes_too_long_ends_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path)
    options = gpu_validation.parse_options(["--architecture", "9.0a"])
    validation = gpu_validation.Validation(options)
    script = f"echo begun; sleep 60 & echo $! >{tmp_path / 'child'}; wait"
    with pytest.raises(gpu_validation.StepFailed, match="ended after 1 s\nbegun"):
        validation.run("waits", ["bash", "-c", script], 1.0)
    status = Path("/proc") / (tmp_path / "child").read_text().strip() / "status"
    # Gone, or dead and not yet collected by whoever adopted it.
    assert not status.exists() or re.search(r"State:\s+[ZX]", status.read_text())


def test_steps_side_by_side_fail_with_all_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path)
    options = gpu_validation.parse_options(["--architecture", "9.0a"])
    validation = gpu_validation.Validation(options)

    def run(word: str) -> str:
        return validation.run(word, ["bash", "-c", f"echo {word}; [[ {word} == good ]]"], 10)

    assert validation.side_by_side(run, ["good"]) == {"good": "good\n"}
    with pytest.raises(gpu_validation.StepFailed, match=r"(?s)status 1\nbad.*status 1\nworse"):
        validation.side_by_side(run, ["bad", "good", "worse"])


def test_an_interpreter_of_another_name_is_called_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sys.executable
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path / "build")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3.12"))
    folder = Path(gpu_validation.python_folder())
    assert folder == tmp_path / "build" / "bin"
    (tmp_path / "bin" / "python3.12").symlink_to(real)
    said = subprocess.run([folder / "python", "-c", "print(6 * 7)"], capture_output=True, text=True)
    assert said.stdout == "42\n"


def test_a_torch_that_cannot_use_the_gpu_is_refused(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 580.65, 81559 MiB, 9.0"\n')
    tool.chmod(0o755)
    done = _run(PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert re.search(r"torch \S+ \(CUDA: \S+\) cannot use NVIDIA H100 80GB HBM3", done.stderr)
