#!/usr/bin/env python
"""Writes the tables of README.md and docs/ from benchmarks/results, so that nobody types figures.

    python benchmarks/update_docs.py            rewrite the marked blocks
    python benchmarks/update_docs.py --check    exit 1 where a block is not what the results say

A block is what stands between <!-- BEGIN benchmarks:NAME --> and <!-- END benchmarks:NAME -->. Of
each device and instruction set the newest result file counts; README.md shows the newest of all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import accumulation_report
import accuracy_report
import report
from environment import Environment
from report import Row, time_text
from result_files import RESULTS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/performance.md", "docs/numerics.md")

_NOTHING_YET = (
    "*No results yet: `python benchmarks/bench_attention.py --sweep --save`, the same with "
    "`--accuracy`, then `python benchmarks/update_docs.py`.*"
)

_NO_MINI_BATCHES_YET = (
    "*No results yet: `python benchmarks/bench_gradient_accumulation.py --extra --save`, then "
    "`python benchmarks/update_docs.py`.*"
)

Measured = list[tuple[Environment, list[Row]]]
MeasuredMiniBatches = list[tuple[Environment, list[accumulation_report.Row]]]


def newest_of_each_device(results: Path, kind: str) -> list[Path]:
    """Result files KIND_DEVICE_DATE.json: the last of each device, the newest first."""
    newest: dict[str, Path] = {}
    for path in results.glob(f"{kind}_*.json"):
        device, _, date = path.stem.rpartition("_")
        if device not in newest or newest[device].stem.rpartition("_")[2] < date:
            newest[device] = path
    return sorted(
        newest.values(), key=lambda path: (path.stem.rpartition("_")[2], path.stem), reverse=True
    )


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---"] + ["--:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, alignment, *rows))


def _bold_if(condition: bool, text: str) -> str:
    return f"**{text}**" if condition else text


def _losses(rows: Sequence[Row | accumulation_report.Row]) -> str:
    slower = [row for row in rows if row.ratio < 1.0]
    if not slower:
        return f"None of the {len(rows)} workloads measured is slower than torch."
    named = ", ".join(f"{row.workload} ({row.ratio:.2f})" for row in slower)
    return f"Slower than torch, of {len(rows)} workloads measured: {named}."


def summary_block(measured: Measured) -> str:
    """README.md: times and ratios of the workloads with a target."""
    if not measured:
        return _NOTHING_YET
    environment, rows = measured[0]
    shown = [
        (
            row.workload,
            time_text(row.torch_seconds),
            time_text(row.torch_ext_seconds),
            _bold_if(row.ratio >= 1.0, f"{row.ratio:.2f}x"),
        )
        for row in rows
        if row.group == "target"
    ]
    table = _markdown(("workload", "torch, ms", "torch_ext, ms", "times faster"), shown)
    return f"{environment.title}\n\n{table}\n\n{_losses(rows)}"


def full_block(measured: Measured) -> str:
    """docs/performance.md: everything, on every device."""
    if not measured:
        return _NOTHING_YET
    parts = []
    for environment, rows in measured:
        parts.append(f"### {environment.title}")
        if environment.peaks is not None:
            peaks = environment.peaks
            dots = f", `vdpbf16ps` {peaks.bf16_gflops:.0f} GF/s" if peaks.bf16_gflops else ""
            parts.append(
                f"Measured peaks: multiply-add {peaks.fma_gflops:.0f} GF/s{dots}, reading "
                f"{peaks.read_gbytes:.1f} GB/s."
            )
        for group, title in (
            ("target", "Workloads with a target"),
            ("sweep", "Off the beaten track"),
            ("extra", "Without a target"),
        ):
            members = [row for row in rows if row.group == group]
            if members:
                shown = [report.cells(row) for row in members]
                parts.append(f"**{title}**\n\n{_markdown(report.HEADINGS, shown)}")
        parts.append(
            report.summary(rows).replace("\n  missed:", "\n- missed:") + "\n\n" + _losses(rows)
        )
    return "\n\n".join(parts)


def mini_batch_summary_block(measured: MeasuredMiniBatches) -> str:
    """README.md: times, ratios and fractions of bandwidth of the mini-batch workloads."""
    if not measured:
        return _NO_MINI_BATCHES_YET
    environment, rows = measured[0]
    shown = [
        (
            row.workload,
            row.fastest,
            time_text(row.torch_seconds),
            time_text(row.torch_ext_seconds),
            _bold_if(row.ratio >= 1.0, f"{row.ratio:.2f}x"),
        )
        for row in rows
        if row.group == "target"
    ]
    headings = (
        "workload",
        "the fastest of torch's ways",
        "torch, ms",
        "torch_ext, ms",
        "times faster",
    )
    return f"{environment.title}\n\n{_markdown(headings, shown)}\n\n{_losses(rows)}"


def mini_batch_block(measured: MeasuredMiniBatches) -> str:
    """docs/performance.md: all mini-batch workloads, on every device."""
    if not measured:
        return _NO_MINI_BATCHES_YET
    parts = []
    for environment, rows in measured:
        bandwidth = max(row.memory_bandwidth for row in rows) / 1e9
        parts.append(f"### {environment.title}")
        parts.append(f"Measured memory bandwidth, reading and writing: {bandwidth:.1f} GB/s.")
        shown = [accumulation_report.cells(row) for row in rows]
        parts.append(_markdown(accumulation_report.HEADINGS, shown))
        summary = accumulation_report.summary(rows).replace("\n  ", "\n- ")
        parts.append(f"{summary}\n\n{_losses(rows)}")
    return "\n\n".join(parts)


def accuracy_block(measured: list[tuple[Environment, list[accuracy_report.Errors]]]) -> str:
    """docs/numerics.md: errors against float64, the larger of the two in bold."""
    if not measured:
        return _NOTHING_YET
    parts = []
    for environment, errors in measured:
        shown = [
            (row.workload, name, f"{stock:.2e}", _bold_if(ours > stock, f"{ours:.2e}"))
            for row in errors
            for name, stock, ours in zip(row.names, row.torch, row.torch_ext, strict=True)
        ]
        table = _markdown(("workload", "tensor", "torch", "torch_ext"), shown)
        parts.append(f"### {environment.title}\n\n{table}")
    return "\n\n".join(parts)


def blocks(results: Path) -> dict[str, str]:
    """The contents of all blocks, by name."""
    measured = [report.read_json(path) for path in newest_of_each_device(results, "attention")]
    errors = [
        accuracy_report.read_json(path) for path in newest_of_each_device(results, "accuracy")
    ]
    mini_batches = [
        accumulation_report.read_json(path)
        for path in newest_of_each_device(results, "mini_batches")
    ]
    return {
        "mini-batches-summary": mini_batch_summary_block(mini_batches),
        "mini-batches-full": mini_batch_block(mini_batches),
        "attention-summary": summary_block(measured),
        "attention-full": full_block(measured),
        "accuracy": accuracy_block(errors),
    }


def rewrite(text: str, contents: dict[str, str]) -> str:
    """``text`` with its blocks filled; raises KeyError for a block that nobody fills."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        begin, end = f"<!-- BEGIN benchmarks:{name} -->", f"<!-- END benchmarks:{name} -->"
        return f"{begin}\n{contents[name]}\n{end}"

    pattern = r"<!-- BEGIN benchmarks:(?P<name>[\w-]+) -->.*?<!-- END benchmarks:(?P=name) -->"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when outdated")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="FOLDER", help="of the documents"
    )
    arguments = parser.parse_args(argv)
    contents = blocks(arguments.results)
    outdated = []
    for name in DOCUMENTS:
        document = arguments.root / name
        before = document.read_text()
        after = rewrite(before, contents)
        if before == after:
            continue
        outdated.append(name)
        if not arguments.check:
            document.write_text(after)
    verb = "outdated" if arguments.check else "updated"
    print("\n".join(f"{verb}: {name}" for name in outdated) or "up to date")
    return 1 if arguments.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
