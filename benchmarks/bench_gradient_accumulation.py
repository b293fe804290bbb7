#!/usr/bin/env python
"""torch_ext's mini-batch operators against the fastest way that PyTorch has for the same.

    python benchmarks/bench_gradient_accumulation.py               the workloads with a target
    python benchmarks/bench_gradient_accumulation.py --extra       and those without
    python benchmarks/bench_gradient_accumulation.py --only "57 M bf16"

See benchmarks/README.md for how it measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import accumulation_report as report
import machine
import timing
import torch
from accumulation_calls import calls_of
from accumulation_workloads import OURS, Workload, select
from memory_bandwidth import COPY, UPDATE, BandwidthProbe
from report import line
from result_files import choose_result_files, say_written, write_rows

_CPU = torch.device("cpu")


@torch.no_grad()
def measure(workload: Workload, plan: timing.Plan, probe: BandwidthProbe) -> report.Row:
    """Times ours, all of torch's ways and the memory in turn."""
    times = timing.measure(calls_of(workload) | probe.calls(), plan, _CPU)
    theirs = [name for name in times if name not in (OURS, COPY, UPDATE)]
    fastest = min(theirs, key=lambda name: times[name].median)
    ratio = timing.ratio(times[fastest], times[OURS])
    return report.Row(
        workload=workload.name,
        group=workload.group,
        fastest=fastest,
        torch_seconds=times[fastest].median,
        torch_ext_seconds=times[OURS].median,
        ratio=ratio.median,
        spread=ratio.spread,
        noisy=ratio.noisy,
        rounds=len(times[OURS].seconds),
        target=workload.ratio,
        bytes=workload.bytes,
        memory_bandwidth=probe.bytes_per_second(times),
        bandwidth_target=workload.bandwidth_fraction,
        others={name: times[name].median for name in theirs if name != fastest},
    )


def run(workloads: Sequence[Workload], arguments: argparse.Namespace) -> None:
    """Prints the table as it grows, then writes what was asked for."""
    environment = machine.describe(_CPU, with_peaks=False)
    print(environment.title)
    probe = BandwidthProbe(4 if arguments.quick else 256)
    plan = timing.QUICK if arguments.quick else timing.Plan(seconds=arguments.seconds)
    print("\n" + line(report.HEADINGS, report.WIDTHS))
    rows = []
    for workload in workloads:
        row = measure(workload, plan, probe)
        print(line(report.cells(row), report.WIDTHS), flush=True)
        rows.append(row)
    print(f"\nmemory bandwidth {max(row.memory_bandwidth for row in rows) / 1e9:.1f} GB/s")
    print(report.summary(rows))
    if arguments.save:
        choose_result_files(arguments, f"mini_batches_{environment.file_stem}")
    if arguments.csv:
        report.write_csv(rows, arguments.csv)
    if arguments.json:
        write_rows(environment, rows, arguments.json)
    say_written(arguments.csv, arguments.json)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORDS", help="workloads whose names have all these words"
    )
    parser.add_argument("--extra", action="store_true", help="those without a target too")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, three rounds: does it run?"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="a candidate and workload, about"
    )
    parser.add_argument("--threads", type=int, help="torch's default when not given")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--save", action="store_true", help="CSV and JSON in benchmarks/results, by device and date"
    )
    parser.add_argument("--list", action="store_true", help="name the workloads and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    groups = ("target", "extra") if arguments.extra else ("target",)
    workloads = select(arguments.only, groups)
    if not workloads:
        parser.error(f"--only: no workload has all the words of {arguments.only!r} (see --list)")
    if arguments.list:
        print("\n".join(f"{workload.group:<8}{workload.name}" for workload in workloads))
        return 0
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads takes a number of at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.seconds <= 0:
        parser.error(f"--seconds takes a number above 0, got {arguments.seconds:g}")
    for path in (arguments.csv, arguments.json):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} for {path.name}")
    if arguments.quick:
        workloads = [workload.shrunk() for workload in workloads]
    run(workloads, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
