"""benchmarks/: they run on tiny shapes, measure what they say, and write what the docs read."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rounding_bounds import no_further_than

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(_BENCHMARKS))
    yield
    sys.path.remove(str(_BENCHMARKS))


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_workloads_are_told_apart_and_found() -> None:
    workloads = _module("workloads")
    names = [workload.name for workload in workloads.WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(workload.ratio is not None for workload in workloads.select())
    found = workloads.select("Causal BF16 forward")
    assert found
    assert all("causal" in w.name and "bf16" in w.name for w in found)
    assert workloads.select("no such thing") == []
    swept = {w.head_dim for w in workloads.WORKLOADS if w.group == "sweep"}
    assert {32, 80, 96, 256} <= swept


def test_work_is_counted_by_the_pairs_that_take_part() -> None:
    workload = _module("workloads").Workload("w", "float32", "forward", q_len=5, kv_len=4)
    assert workload.attended_pairs == 20
    assert dataclasses.replace(workload, causal=True).attended_pairs == 1 + 2 + 3 + 4 + 4
    window = dataclasses.replace(workload, mask="sliding_window", window=2)
    assert window.attended_pairs == 1 + 2 + 2 + 2 + 2
    assert dataclasses.replace(workload, mask="half_padding").attended_pairs == 10
    assert workload.flops == 2 * 2 * 2 * 8 * 20 * 64
    backward = dataclasses.replace(workload, measured="forward_backward")
    assert backward.flops == 3.5 * workload.flops


def test_every_workload_runs_and_agrees_with_torch() -> None:
    workloads, accuracy = _module("workloads"), _module("accuracy")
    for workload in workloads.WORKLOADS:
        errors = accuracy.measure_errors(workload.shrunk(), _CPU)
        dtype = getattr(torch, workload.dtype)
        for name, error, stock in zip(errors.names, errors.torch_ext, errors.torch, strict=True):
            assert error <= no_further_than(stock, 1.0, dtype), (workload.name, name, error, stock)


def test_timing_takes_turns_and_compares_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = _module("timing")
    order: list[str] = []
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

    def call(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds

    plan = timing.Plan(seconds=0.0, min_samples=4, warm_up=1)
    times = timing.measure(
        {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 0.005)}, plan, _CPU
    )
    # After warm-up and the calls that choose the repetitions: every second round in reverse.
    assert order[-8:] == ["slow", "fast", "fast", "slow"] * 2
    assert len(times["slow"].seconds) == 4
    assert times["slow"].seconds == pytest.approx([0.02] * 4)
    assert times["fast"].seconds == pytest.approx([0.005] * 4)
    assert timing.ratio(times["slow"], times["fast"]).median == pytest.approx(4.0)


def test_noise_is_noticed() -> None:
    timing = _module("timing")
    steady = timing.Measurement([1.0] * 8)
    assert not timing.ratio(steady, timing.Measurement([0.5] * 8)).noisy
    disturbed = timing.ratio(steady, timing.Measurement([0.5, 0.5, 0.9, 0.5, 1.0, 0.7, 0.5, 0.8]))
    assert disturbed.noisy
    # One disturbed round leaves the ratio alone.
    assert timing.ratio(steady, timing.Measurement([0.5] * 7 + [9.0])).median == 2.0


def test_quick_run_writes_csv_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"figures.{kind}" for kind in ("csv", "json", "png")}
    flags = ["--quick", "--no-peaks", "--only", "bf16"]
    outputs = [
        "--csv",
        str(files["csv"]),
        "--json",
        str(files["json"]),
        "--plot",
        str(files["png"]),
    ]
    assert _module("bench_attention").main([*flags, *outputs, "--peers", "math"]) == 0
    printed = capsys.readouterr().out
    assert "torch_ext ms" in printed
    assert "targets reached" in printed
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(_module("workloads").select("bf16"))
    for row in rows:
        assert "bf16" in row["workload"]
        assert float(row["torch_seconds"]) > 0
        assert float(row["torch_ext_seconds"]) > 0
        assert float(row["math_seconds"]) > 0
        assert row["path"].startswith("cpu.")
    assert json.loads(files["json"].read_text())["environment"]["torch"] == torch.__version__
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_accuracy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "errors.csv"
    flags = ["--accuracy", "--quick", "--only", "dropout fp32", "--csv", str(target)]
    assert _module("bench_attention").main(flags) == 0
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tensor"] for row in rows] == ["out", "grad_query", "grad_key", "grad_value"]
    for row in rows:
        error, stock = float(row["torch_ext_error"]), float(row["torch_error"])
        assert error <= no_further_than(stock, 1.0, torch.float32)
    assert "dropout 0.1" in capsys.readouterr().out


def test_threads_are_set_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    flags = ["--quick", "--no-peaks", "--only", "tiny forward fp32", "--threads", "1"]
    assert _module("bench_attention").main(flags) == 0
    assert asked == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "nothing like it"], "no workload has all the words of 'nothing like it'"),
        (["--threads", "0"], "--threads takes a number of at least 1, got 0"),
        (["--seconds", "0"], "--seconds takes a number above 0"),
        (["--csv", "/no/such/folder/x.csv"], "there is no folder /no/such/folder"),
        (["--accuracy", "--plot", "x.png"], "--plot draws times"),
    ],
)
def test_bad_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        _module("bench_attention").main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_peaks_are_measured() -> None:
    peaks = _module("machine").measure_peaks(1, "default")
    assert peaks.threads == 1
    assert peaks.fma_gflops > 1
    assert peaks.read_gbytes > 0.1
    assert peaks.gflops("bfloat16") == peaks.fma_gflops  # no dot products in this instruction set


def _documents(root: Path) -> Path:
    (root / "docs").mkdir(parents=True)
    for name, block in (
        ("README.md", "attention-summary"),
        ("docs/performance.md", "attention-full"),
        ("docs/numerics.md", "accuracy"),
    ):
        begin, end = f"<!-- BEGIN benchmarks:{block} -->", f"<!-- END benchmarks:{block} -->"
        (root / name).write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return root


def test_documents_are_written_from_results(tmp_path: Path) -> None:
    bench, update = _module("bench_attention"), _module("update_docs")
    root, results = _documents(tmp_path / "project"), tmp_path / "results"
    results.mkdir()
    flags = ["--root", str(root), "--results", str(results)]
    assert update.main(flags) == 0
    assert "No results yet" in (root / "README.md").read_text()

    quick = ["--quick", "--no-peaks", "--only", "tiny forward"]
    old, new = (results / f"attention_cpu_{date}.json" for date in ("2026-01-02", "2026-02-01"))
    bench.main([*quick, "--json", str(old)])
    content = json.loads(old.read_text())
    content["rows"][0] |= {"ratio": 0.5, "torch_seconds": 0.001, "torch_ext_seconds": 0.002}
    new.write_text(json.dumps(content))
    bench.main([*quick, "--accuracy", "--json", str(results / "accuracy_cpu_2026-01-02.json")])

    assert update.main([*flags, "--check"]) == 1
    assert update.main(flags) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    name = content["rows"][0]["workload"]
    assert f"| {name} | 1.00 | 2.00 | 0.50x |" in readme
    assert "Slower than torch" in readme
    assert f"{name} (0.50)" in readme
    assert name in (root / "docs/performance.md").read_text()
    assert "| out |" in (root / "docs/numerics.md").read_text()
    assert update.main([*flags, "--check"]) == 0


def test_the_projects_documents_say_what_its_results_say() -> None:
    assert _module("update_docs").main(["--check"]) == 0
