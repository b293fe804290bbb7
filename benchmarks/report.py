"""One line a workload: times, ratios and fractions of peak; text, CSV, JSON, picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import Environment
from result_files import csv_text, read_rows

MILLI = 1e3


@dataclass(frozen=True)
class Row:
    """What was measured of one workload. Times in seconds, medians over the rounds.

    ``ratio``: torch's time over ours. ``spread``: the middle half of the rounds' ratios over their
    median. ``others``: times of further peers.
    """

    workload: str
    group: str
    torch_seconds: float
    torch_ext_seconds: float
    ratio: float
    spread: float
    noisy: bool
    rounds: int
    target: float | None
    gflops: float
    peak_fraction: float | None
    peak_target: float | None
    bandwidth_fraction: float | None
    bandwidth_target: float | None
    path: str
    others: dict[str, float]

    @property
    def verdict(self) -> str:
        """What the row says about its target; a row without one only must not be slower."""
        if self.target is None and self.group == "extra":
            return ""
        goal = self.target if self.target is not None else 1.0
        reached = self.ratio >= goal
        for value, wanted in (
            (self.peak_fraction, self.peak_target),
            (self.bandwidth_fraction, self.bandwidth_target),
        ):
            if value is not None and wanted is not None:
                reached = reached and value >= wanted
        return "reached" if reached else "missed"


HEADINGS = ("workload", "torch ms", "torch_ext ms", "ratio", "target", "GF/s", "of peak", "notes")


def time_text(seconds: float) -> str:
    """Milliseconds with three digits that mean something."""
    milliseconds = seconds * MILLI
    decimals = (
        4 if milliseconds < 0.1 else 3 if milliseconds < 1 else 2 if milliseconds < 100 else 1
    )
    return f"{milliseconds:.{decimals}f}"


def cells(row: Row) -> tuple[str, ...]:
    """The row under HEADINGS."""
    fraction = ""
    if row.bandwidth_fraction is not None:
        fraction = f"{row.bandwidth_fraction:.0%} read"
        if row.bandwidth_target is not None:
            fraction += f" ({row.bandwidth_target:.0%})"
    elif row.peak_fraction is not None:
        fraction = f"{row.peak_fraction:.0%}"
        if row.peak_target is not None:
            fraction += f" ({row.peak_target:.0%})"
    notes = [note for note in (row.verdict if row.verdict == "missed" else "",) if note]
    if row.noisy:
        notes.append(f"noisy: {row.spread:.0%}")
    notes += [f"{name} {time_text(seconds)} ms" for name, seconds in row.others.items()]
    return (
        row.workload,
        time_text(row.torch_seconds),
        time_text(row.torch_ext_seconds),
        f"{row.ratio:.2f}",
        "" if row.target is None else f"{row.target:g}",
        f"{row.gflops:.1f}",
        fraction,
        ", ".join(notes),
    )


WIDTHS = (58, 10, 12, 7, 7, 8, 15, 0)


def line(values: Sequence[str], widths: Sequence[int] = WIDTHS) -> str:
    """One line of the running table: a row is printed when it is measured, not at the end."""
    first, *rest = zip(values, widths, strict=True)
    text = first[0].ljust(first[1]) + "".join(v.rjust(w) for v, w in rest[:-1])
    return f"{text}  {rest[-1][0]}".rstrip()


def summary(rows: Sequence[Row]) -> str:
    """How many targets were reached, and everything that was not or was slower than torch."""
    judged = [row for row in rows if row.verdict]
    missed = [row for row in judged if row.verdict == "missed"]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets reached"]
    lines += [f"  missed: {row.workload} (ratio {row.ratio:.2f})" for row in missed]
    noisy = sum(row.noisy for row in rows)
    if noisy:
        lines.append(f"{noisy} rows are noisy: is another process running?")
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every field of every row; the other peers' times in columns of their own."""
    others = sorted({name for row in rows for name in row.others})
    fields = [field for field in asdict(rows[0]) if field != "others"] + ["verdict"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*fields, *(f"{name}_seconds" for name in others)])
        for row in rows:
            values = asdict(row) | {"verdict": row.verdict}
            texts = [csv_text(values[field]) for field in fields]
            writer.writerow([*texts, *(csv_text(row.others.get(name)) for name in others)])


def read_json(path: Path) -> tuple[Environment, list[Row]]:
    """Environment and rows of a file that result_files.write_rows wrote."""
    environment, rows = read_rows(path)
    return environment, [Row(**row) for row in rows]


def draw(environment: Environment, rows: Sequence[Row], path: Path) -> None:
    """A bar for each workload's ratio, the target as a mark; 1 is torch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.28 * len(rows)), layout="constrained")
    positions = range(len(rows))
    colours = ["tab:blue" if row.ratio >= 1 else "tab:red" for row in rows]
    axes.barh(positions, [row.ratio for row in rows], color=colours)
    for position, row in zip(positions, rows, strict=True):
        if row.target is not None:
            axes.plot([row.target] * 2, [position - 0.45, position + 0.45], color="black")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(positions, [row.workload for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times faster than torch (black: target)")
    axes.set_title(environment.title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
