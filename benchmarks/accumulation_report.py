"""One line a mini-batch workload: times, ratios, bytes and fractions of bandwidth."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import Environment
from report import time_text
from result_files import csv_text, read_rows


@dataclass(frozen=True)
class Row:
    """What was measured of one workload. Times in seconds, medians over the rounds.

    ``ratio``: the time of the fastest of torch's ways over ours, the median of the rounds' own.
    ``spread``: the middle half of those over their median. ``bytes``: read and written at least.
    ``memory_bandwidth``: bytes a second, measured in the same rounds.
    """

    workload: str
    group: str
    fastest: str
    torch_seconds: float
    torch_ext_seconds: float
    ratio: float
    spread: float
    noisy: bool
    rounds: int
    target: float | None
    bytes: float
    memory_bandwidth: float
    bandwidth_target: float | None
    others: dict[str, float]

    @property
    def bandwidth_fraction(self) -> float | None:
        if not self.bytes:
            return None
        return self.bytes / self.torch_ext_seconds / self.memory_bandwidth

    @property
    def verdict(self) -> str:
        """What the row says about its targets; "" without one."""
        if self.target is None and self.bandwidth_target is None:
            return ""
        # A ratio of 1 asks for no slower, within what two runs of one program differ by.
        slack = 0.02 if self.target == 1.0 else 0.0
        reached = self.target is None or self.ratio >= self.target - slack
        if self.bandwidth_target is not None:
            fraction = self.bandwidth_fraction
            reached = reached and fraction is not None and fraction >= self.bandwidth_target
        return "reached" if reached else "missed"


HEADINGS = (
    "workload",
    "torch ms",
    "torch_ext ms",
    "ratio",
    "target",
    "MB",
    "of memory",
    "fastest of torch's ways; the others; notes",
)
WIDTHS = (60, 10, 13, 7, 7, 9, 12, 0)


def cells(row: Row) -> tuple[str, ...]:
    """The row under HEADINGS."""
    fraction = ""
    if row.bandwidth_fraction is not None:
        fraction = f"{row.bandwidth_fraction:.0%}"
        if row.bandwidth_target is not None:
            fraction += f" ({row.bandwidth_target:.0%})"
    notes = [row.fastest]
    notes += [f"{name} {time_text(seconds)} ms" for name, seconds in row.others.items()]
    if row.verdict == "missed":
        notes.append("missed")
    if row.noisy:
        notes.append(f"noisy: {row.spread:.0%}")
    return (
        row.workload,
        time_text(row.torch_seconds),
        time_text(row.torch_ext_seconds),
        f"{row.ratio:.2f}",
        "" if row.target is None else f"{row.target:g}",
        f"{row.bytes / 1e6:.1f}" if row.bytes else "",
        fraction,
        "; ".join(notes),
    )


def summary(rows: Sequence[Row]) -> str:
    """How many targets were reached, and which were not."""
    judged = [row for row in rows if row.verdict]
    missed = [row for row in judged if row.verdict == "missed"]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets reached"]
    lines += [f"  missed: {row.workload} (ratio {row.ratio:.2f})" for row in missed]
    slower = [row for row in rows if not row.verdict and row.ratio < 1.0]
    lines += [f"  slower than torch: {row.workload} (ratio {row.ratio:.2f})" for row in slower]
    noisy = sum(row.noisy for row in rows)
    if noisy:
        lines.append(f"{noisy} rows are noisy: is another process running?")
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line a row; the ways that were not the fastest as NAME=SECONDS."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [field for field in asdict(rows[0]) if field != "others"]
        writer.writerow([*fields, "bandwidth_fraction", "verdict", "others"])
        for row in rows:
            values = [asdict(row)[field] for field in fields]
            others = " ".join(f"{name.replace(' ', '_')}={s:.6g}" for name, s in row.others.items())
            writer.writerow(
                [*map(csv_text, values), csv_text(row.bandwidth_fraction), row.verdict, others]
            )


def read_json(path: Path) -> tuple[Environment, list[Row]]:
    """Environment and rows of a file that result_files.write_rows wrote."""
    environment, rows = read_rows(path)
    return environment, [Row(**row) for row in rows]
