#!/usr/bin/env python
"""torch_ext's attention against PyTorch's own: speed, fraction of peak, accuracy.

    python benchmarks/bench_attention.py                     the workloads with a target
    python benchmarks/bench_attention.py --sweep             and the shapes off the beaten track
    python benchmarks/bench_attention.py --only "causal bf16"
    python benchmarks/bench_attention.py --accuracy          errors against float64 instead

See benchmarks/README.md for how it measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import accuracy_report
import machine
import report
import timing
import torch
from accuracy import measure_errors
from environment import Peaks
from peers import PEERS, Unsupported, call_of, make_inputs
from result_files import choose_result_files, say_written, write_rows
from workloads import Workload, select

import torch_ext


def measure(
    workload: Workload,
    others: Sequence[str],
    plan: timing.Plan,
    device: torch.device,
    peaks: Peaks | None,
) -> report.Row:
    """Times torch, torch_ext and the other peers in turn."""
    inputs = make_inputs(workload, device)
    calls = {name: call_of(name, inputs) for name in ("torch", "torch_ext")}
    for name in others:
        try:
            calls[name] = call_of(name, inputs)
        except Unsupported as reason:
            print(f"  {name} {reason}: left out of {workload.name}", file=sys.stderr)
    calls["torch_ext"]()
    path = torch_ext.last_attention_path()
    times = timing.measure(calls, plan, device)
    ratio = timing.ratio(times["torch"], times["torch_ext"])
    ours = times["torch_ext"].median
    gflops = 1e-9 * workload.flops / ours
    peak_fraction = bandwidth_fraction = None
    if peaks is not None and workload.q_len == 1:
        bandwidth_fraction = 1e-9 * workload.kv_bytes / ours / peaks.read_gbytes
    elif peaks is not None:
        peak_fraction = gflops / peaks.gflops(workload.dtype)
    return report.Row(
        workload=workload.name,
        group=workload.group,
        torch_seconds=times["torch"].median,
        torch_ext_seconds=ours,
        ratio=ratio.median,
        spread=ratio.spread,
        noisy=ratio.noisy,
        rounds=len(times["torch"].seconds),
        target=workload.ratio,
        gflops=gflops,
        peak_fraction=peak_fraction,
        peak_target=workload.peak_fraction,
        bandwidth_fraction=bandwidth_fraction,
        bandwidth_target=workload.bandwidth_fraction,
        path=path,
        others={name: times[name].median for name in others if name in times},
    )


def run_accuracy(
    workloads: Sequence[Workload], arguments: argparse.Namespace, device: torch.device
) -> None:
    """Prints errors instead of times, then writes what was asked for."""
    environment = machine.describe(device, with_peaks=False)
    print(environment.title)
    measured = []
    for workload in workloads:
        errors = measure_errors(workload, device)
        print(accuracy_report.format_errors(errors), flush=True)
        measured.append(errors)
    if arguments.save:
        choose_result_files(arguments, f"accuracy_{environment.file_stem}")
    if arguments.csv:
        accuracy_report.write_csv(measured, arguments.csv)
    if arguments.json:
        accuracy_report.write_json(environment, measured, arguments.json)
    say_written(arguments.csv, arguments.json, arguments.plot)


def run_timing(
    workloads: Sequence[Workload], arguments: argparse.Namespace, device: torch.device
) -> None:
    """Prints the table as it grows, then writes what was asked for."""
    environment = machine.describe(device, with_peaks=not arguments.no_peaks)
    print(environment.title)
    peaks = environment.peaks
    if peaks is not None:
        bf16 = f", vdpbf16ps {peaks.bf16_gflops:.0f} GF/s" if peaks.bf16_gflops > 0 else ""
        print(
            f"measured peaks: multiply-add {peaks.fma_gflops:.0f} GF/s{bf16}, "
            f"reading {peaks.read_gbytes:.1f} GB/s"
        )
    print("\n" + report.line(report.HEADINGS))
    plan = timing.QUICK if arguments.quick else timing.Plan(seconds=arguments.seconds)
    rows = []
    for workload in workloads:
        row = measure(workload, arguments.peers, plan, device, peaks)
        print(report.line(report.cells(row)), flush=True)
        rows.append(row)
    print("\n" + report.summary(rows))
    if arguments.save:
        choose_result_files(arguments, f"attention_{environment.file_stem}")
    if arguments.csv:
        report.write_csv(rows, arguments.csv)
    if arguments.json:
        write_rows(environment, rows, arguments.json)
    if arguments.plot:
        report.draw(environment, rows, arguments.plot)
    say_written(arguments.csv, arguments.json, arguments.plot)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORDS", help="workloads whose names have all these words"
    )
    parser.add_argument("--sweep", action="store_true", help="the sweep and the extras too")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, three rounds: does it run?"
    )
    parser.add_argument("--accuracy", action="store_true", help="errors against float64, no times")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="a candidate and workload, about"
    )
    parser.add_argument("--threads", type=int, help="torch's default when not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[],
        choices=sorted(set(PEERS) - {"torch", "torch_ext"}),
        help="beside torch's scaled_dot_product_attention and nn.MultiheadAttention",
    )
    parser.add_argument(
        "--no-peaks", action="store_true", help="do not measure the machine's peaks"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="ratios as bars (needs matplotlib)"
    )
    parser.add_argument(
        "--save", action="store_true", help="CSV and JSON in benchmarks/results, by device and date"
    )
    parser.add_argument("--list", action="store_true", help="name the workloads and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    groups = ("target", "sweep", "extra") if arguments.sweep else ("target",)
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
    for path in (arguments.csv, arguments.json, arguments.plot):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} for {path.name}")
    if arguments.accuracy and arguments.plot:
        parser.error("--plot draws times: leave --accuracy away")
    device = torch.device(arguments.device)
    if arguments.quick:
        workloads = [workload.shrunk() for workload in workloads]
    if arguments.accuracy:
        run_accuracy(workloads, arguments, device)
    else:
        run_timing(workloads, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
