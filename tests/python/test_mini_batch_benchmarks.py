"""benchmarks/bench_gradient_accumulation.py: each way does the same, and is measured as it says."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(_BENCHMARKS))
    yield
    sys.path.remove(str(_BENCHMARKS))


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_workloads_are_told_apart_and_found() -> None:
    workloads = _module("accumulation_workloads")
    names = [workload.name for workload in workloads.WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(workload.ratio is not None for workload in workloads.select())
    found = workloads.select("57 m BF16")
    assert found
    assert all("57 M" in w.name and "bf16" in w.name for w in found)
    assert {w.kind for w in workloads.WORKLOADS} <= set(_module("accumulation_calls").CALLS)


def test_the_model_has_57_million_parameters_in_96_tensors() -> None:
    workloads = _module("accumulation_workloads")
    named = {workload.name: workload for workload in workloads.WORKLOADS}
    workload = named["accumulate 57 M in 96 tensors, fp32 into fp32"]
    assert len(workload.shapes) == 96
    assert round(workload.elements / 1e6) == 57
    assert workload.bytes == 12 * workload.elements
    half = named["accumulate 57 M in 96 tensors, bf16 into fp32"]
    assert half.bytes == 10 * half.elements


@torch.no_grad()
def test_every_way_does_the_same() -> None:
    """From the same tensors, each way's first call leaves the same accumulators and parameters."""
    workloads, calls = _module("accumulation_workloads"), _module("accumulation_calls")
    for workload in workloads.WORKLOADS:
        if workload.kind == "norm" or "window" in workload.kind:
            continue
        small = workload.shrunk()
        results = []
        for name in calls.calls_of(small):
            call = calls.calls_of(small)[name]
            call()
            results.append((name, _tensors_of(call)))
        for name, tensors in results[1:]:
            for mine, other in zip(results[0][1], tensors, strict=True):
                # Gradients that torch rounds to bf16 before it adds them.
                atol = 1e-4 if workload.dtype == "float32" else 0.1
                torch.testing.assert_close(other, mine, rtol=2e-2, atol=atol, msg=name)


def _tensors_of(call: object) -> list[torch.Tensor]:
    """What a call's closure writes: the float32 tensors of its lists."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.dtype is torch.float32 and not isinstance(value, torch.nn.Parameter):
                found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "params"):  # parameters with their optimizer
            visit(value.params)
        elif hasattr(value, "__self__"):
            visit(value.__self__)
        elif callable(value) and getattr(value, "__closure__", None):
            for cell in value.__closure__:
                visit(cell.cell_contents)

    visit(call)
    assert found
    return sorted(found, key=lambda t: (t.numel(), float(t.sum())))


def test_norms_agree() -> None:
    workloads, calls = _module("accumulation_workloads"), _module("accumulation_calls")
    (workload,) = workloads.select("norm and inf check")
    ways = calls.calls_of(workload.shrunk())
    norm, _, found_inf = ways["torch_ext"]()
    assert found_inf == 0
    torch.testing.assert_close(ways["unscale and get_total_norm"](), norm)
    assert ways["get_total_norm, isfinite"]()


@pytest.mark.parametrize("kind", ["mlp", "parallel"])
def test_training_windows_agree(kind: str) -> None:
    """All trainings start from one model and see the same micro-batches."""
    workloads, windows = _module("accumulation_workloads"), _module("training_windows")
    for workload in workloads.WORKLOADS:
        if workload.kind != f"{kind}_window":
            continue
        torch.manual_seed(0)
        trainings = getattr(windows, f"{kind}_trainings")(workload.shrunk())
        moments = {}
        for name, training in trainings.items():
            for _ in range(2):
                training.window()
            states = training.optimizer.state
            moments[name] = [states[p]["exp_avg"] for p in training.model.parameters()]
        ours = moments.pop("torch_ext")
        assert any(moment.abs().max() > 1e-4 for moment in ours)
        for name, theirs in moments.items():
            for mine, other in zip(ours, theirs, strict=True):
                is_fp32 = workload.dtype == "float32"
                rtol, atol = (1e-3, 1e-6) if is_fp32 else (5e-2, 1e-3)
                torch.testing.assert_close(mine, other, rtol=rtol, atol=atol, msg=name)


def test_quick_run_writes_csv_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"figures.{kind}" for kind in ("csv", "json")}
    flags = ["--quick", "--extra", "--csv", str(files["csv"]), "--json", str(files["json"])]
    assert _module("bench_gradient_accumulation").main(flags) == 0
    printed = capsys.readouterr().out
    assert "torch_ext ms" in printed
    assert "memory bandwidth" in printed
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(_module("accumulation_workloads").WORKLOADS)
    for row in rows:
        assert float(row["torch_seconds"]) > 0
        assert float(row["torch_ext_seconds"]) > 0
        assert row["fastest"]
        assert row["fastest"] != "torch_ext"
        if "window" in row["workload"]:
            assert not row["bandwidth_fraction"]
        else:
            assert float(row["bandwidth_fraction"]) > 0
    environment, read = _module("accumulation_report").read_json(files["json"])
    assert environment.torch == torch.__version__
    assert [row.workload for row in read] == [row["workload"] for row in rows]
    assert json.loads(files["json"].read_text())["rows"][0]["memory_bandwidth"] > 0


def test_documents_are_written_from_results(tmp_path: Path) -> None:
    bench, update = _module("bench_gradient_accumulation"), _module("update_docs")
    (tmp_path / "docs").mkdir()
    documents = {
        "README.md": "mini-batches-summary",
        "docs/performance.md": "mini-batches-full",
        "docs/numerics.md": "accuracy",
    }
    for name, block in documents.items():
        begin, end = f"<!-- BEGIN benchmarks:{block} -->", f"<!-- END benchmarks:{block} -->"
        (tmp_path / name).write_text(f"{begin}\nold\n{end}\n")
    flags = ["--root", str(tmp_path), "--results", str(tmp_path)]
    assert update.main(flags) == 0
    assert "No results yet" in (tmp_path / "README.md").read_text()
    results = tmp_path / "mini_batches_cpu_2026-01-02.json"
    bench.main(["--quick", "--only", "norm and inf", "--json", str(results)])
    content = json.loads(results.read_text())
    content["rows"][0] |= {"ratio": 0.5, "torch_seconds": 0.001, "torch_ext_seconds": 0.002}
    results.write_text(json.dumps(content))
    assert update.main(flags) == 0
    name = content["rows"][0]["workload"]
    assert (
        f"| {name} | {content['rows'][0]['fastest']} | 1.00 | 2.00 | 0.50x |"
        in (tmp_path / "README.md").read_text()
    )
    assert f"slower than torch: {name}" in (tmp_path / "docs/performance.md").read_text()


def test_verdicts() -> None:
    report = _module("accumulation_report")
    row = report.Row(
        workload="w",
        group="target",
        fastest="loop",
        torch_seconds=2.0,
        torch_ext_seconds=1.0,
        ratio=2.0,
        spread=0.0,
        noisy=False,
        rounds=7,
        target=1.5,
        bytes=90.0,
        memory_bandwidth=100.0,
        bandwidth_target=0.9,
        others={"foreach": 3.0},
    )
    assert row.bandwidth_fraction == 0.9
    assert row.verdict == "reached"
    assert dataclasses.replace(row, target=2.1).verdict == "missed"
    assert dataclasses.replace(row, memory_bandwidth=101.0).verdict == "missed"
    assert dataclasses.replace(row, target=None, bandwidth_target=None).verdict == ""
    assert dataclasses.replace(row, target=1.0, ratio=0.99).verdict == "reached"
    assert dataclasses.replace(row, target=1.0, ratio=0.97).verdict == "missed"
    slow = dataclasses.replace(row, workload="s", target=None, bandwidth_target=None, ratio=0.5)
    summary = report.summary([row, dataclasses.replace(row, target=3.0), slow])
    assert "1 of 2 targets reached" in summary
    assert "slower than torch: s (ratio 0.50)" in summary


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "nothing like it"], "no workload has all the words of 'nothing like it'"),
        (["--threads", "0"], "--threads takes a number of at least 1, got 0"),
        (["--seconds", "0"], "--seconds takes a number above 0"),
        (["--csv", "/no/such/folder/x.csv"], "there is no folder /no/such/folder"),
    ],
)
def test_bad_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        _module("bench_gradient_accumulation").main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
