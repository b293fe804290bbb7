"""benchmarks/gpu_validation.py and what it runs, as far as that goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_attention
import gpu_mini_batches
import gpu_validation

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "date": "2026-11-25"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "gpu_validation.py")]
    done = subprocess.run(
        script, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "gpu_validation: takes a machine with an NVIDIA GPU" in done.stderr


def test_steps_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_validation.parse_options(["--steps", "build,pytest"]).steps == ["build", "pytest"]
    assert gpu_validation.parse_options([]).steps == list(gpu_validation.LIMITS)
    with pytest.raises(SystemExit):
        gpu_validation.parse_options(["--steps", "build,brew"])
    assert "--steps takes build, googletest" in capsys.readouterr().err


def test_the_limits_leave_ten_minutes() -> None:
    """Steps seldom take their limits; the two benchmarks and the build, most of the time, fit."""
    limits = gpu_validation.LIMITS
    assert limits["build"] + limits["attention"] + limits["mini_batches"] <= 600


@pytest.mark.parametrize(("capability", "architecture"), [("9.0", "9.0a"), ("8.0", "8.0")])
def test_builds_for_the_device(capability: str, architecture: str) -> None:
    assert gpu_validation.architecture_of(capability) == architecture


def test_a_failing_step_is_reported_and_the_others_go_on() -> None:
    def fails() -> tuple[str, list[str]]:
        raise gpu_validation.StepFailed("exit status 1\nlast line")

    step = gpu_validation.take_step("pytest", fails)
    assert (step.ok, step.summary, step.details) == (False, "exit status 1", ["last line"])
    step = gpu_validation.take_step("build", lambda: ("12 passed", []))
    assert (step.ok, step.summary) == (True, "12 passed")


def test_commands_are_logged_and_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path)
    options = gpu_validation.parse_options(["--architecture", "9.0a"])
    validation = gpu_validation.Validation(options)
    assert validation.environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert validation.run("echo", ["echo", "said"], 10) == "said\n"
    assert (tmp_path / "log" / "echo.log").read_text() == "said\n"
    with pytest.raises(gpu_validation.StepFailed, match="exit status 3\nthe end"):
        validation.run("fails", ["bash", "-c", "echo the end; exit 3"], 10)
    with pytest.raises(gpu_validation.StepFailed, match="ended after 0 s"):
        validation.run("sleeps", ["sleep", "5"], 0.1)


def test_results_are_named_after_device_and_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_validation, "BUILD", tmp_path)
    (tmp_path / "attention.json").write_text('{"rows": []}')
    steps = [gpu_validation.Step("build", True, 1.5, "with CUDA")]
    path = gpu_validation.write_results(MACHINE, steps, tmp_path / "results")
    assert path.name == "gpu_nvidia-h100-80gb-hbm3_2026-11-25.json"
    content = json.loads(path.read_text())
    assert content["machine"] == MACHINE
    assert content["steps"][0]["summary"] == "with CUDA"
    assert content["attention"] == {"rows": []}
    assert "mini_batches" not in content


def test_attention_cases_are_what_they_say() -> None:
    cases = gpu_attention.cases()
    assert len({case.name for case in cases}) == len(cases)
    by_name = {case.name: case for case in cases}
    forward = by_name["forward D128 S4096"]
    # 2 products x 2 operations x 16 heads x 4 sequences
    assert forward.flops == 4 * 16 * 4 * 4096**2 * 128
    assert by_name["backward D128 S4096"].flops == 2.5 * forward.flops
    assert by_name["forward D128 S4096 causal"].flops == forward.flops / 2
    decode = by_name["decode GQA 32/8 8192 keys"]
    assert decode.kv_bytes == 2 * 64 * 8 * 8192 * 128 * 2
    for case in cases:
        assert case.q_len * case.batch <= 64 * 1024
        tiny = gpu_attention.small(case)
        assert tiny.q_len <= 128
        assert tiny.name == case.name


def test_attention_lines_say_what_was_missed() -> None:
    case = next(c for c in gpu_attention.cases() if c.name == "forward D64 S2048")
    row = {
        "seconds": {"torch_ext": 1e-3, "flash": 1.2e-3},
        "errors": {"flash": 1e-3},
        "refused": {},
    }
    text, reached = gpu_attention.summary(case, row, 3e12, 8e14)
    assert reached
    assert "flash 1.20x" in text
    row["seconds"]["flash"] = 0.9e-3
    text, reached = gpu_attention.summary(case, row, 3e12, 8e14)
    assert not reached
    assert text.endswith("missed")
    row["seconds"]["flash"], row["errors"]["flash"] = 2e-3, 0.5
    text, reached = gpu_attention.summary(case, row, 3e12, 8e14)
    assert not reached
    assert "DIFFERS by 5.0e-01" in text
    text, reached = gpu_attention.summary(
        case, {"seconds": {}, "errors": {}, "refused": {"torch_ext": "no kernel"}}, 3e12, 8e14
    )
    assert (text.split(), reached) == (
        ["forward", "D64", "S2048", "refused:", "no", "kernel"],
        False,
    )


def test_mini_batch_lines_say_what_was_missed() -> None:
    row = gpu_mini_batches.Row(
        "accumulate", lambda: None, {"foreach": lambda: None}, bytes=2.7e9, fraction=0.9, ratio=1.5
    )
    row.seconds = {"torch_ext": 1.1e-3, "torch_ext graph": 1e-3, "foreach": 2e-3}
    text, reached = gpu_mini_batches.summary(row, 3e12)
    assert reached
    assert "90% of bandwidth" in text
    assert "foreach 1.82x" in text
    row.seconds["foreach"] = 1.2e-3
    assert gpu_mini_batches.summary(row, 3e12)[1] is False
    row.seconds |= {"foreach": 2e-3, "torch_ext graph": 1.2e-3}
    assert gpu_mini_batches.summary(row, 3e12)[1] is False


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' calls are right where there is no GPU to time them."""

    def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        for call in candidates.values():
            call()
        return dict.fromkeys(candidates, 1e-3)

    for module in (gpu_attention, gpu_mini_batches):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "measure_in_turn", measure)
        monkeypatch.setattr(module, "captured", lambda call: call)


@pytest.mark.usefixtures("on_the_cpu")
def test_mini_batch_calls_run() -> None:
    rows = [
        *gpu_mini_batches.accumulate_rows(10_000),
        *gpu_mini_batches.norm_rows(10_000),
        *gpu_mini_batches.step_rows(10_000),
        *gpu_mini_batches.weight_gradient_rows(4),
        *gpu_mini_batches.embedding_rows(16),
    ]
    assert len({row.name for row in rows}) == 10
    for row in rows:
        gpu_mini_batches.run(row, 1)
        assert set(row.seconds) == {"torch_ext", "torch_ext graph", *row.peers}


@pytest.mark.usefixtures("on_the_cpu")
def test_attention_calls_run() -> None:
    for case in gpu_attention.cases(128):
        row = gpu_attention.run_case(gpu_attention.small(case), 1)
        assert "torch_ext" in row["seconds"], row["refused"]
        assert len(row["seconds"]) > 1 or case.dropout > 0, row["refused"]
        assert max(row["errors"].values(), default=0.0) < 2e-2, case.name
        # Torch has neither of these on the CPU, and the message says so.
        assert {"efficient", "cudnn"} <= set(row["refused"])


def test_a_model_of_so_many_elements() -> None:
    shapes = gpu_mini_batches._model_shapes(100_000_000)
    assert len(shapes) == 96
    assert sum(shape[0] for shape in shapes) == pytest.approx(100_000_000, rel=1e-4)
