"""The demo's picture: loss curves over each other, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Outcome

FORMATS = (".png", ".svg", ".pdf")


class PlotError(Exception):
    """The picture cannot be made, with what to do about it."""


def check_plot(path: str) -> None:
    """Raises PlotError now rather than after minutes of training."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise PlotError(f"--plot takes a file ending in {', '.join(FORMATS)}, got {path}")
    if not target.resolve().parent.is_dir():
        raise PlotError(f"--plot: there is no folder {target.resolve().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install matplotlib") from error


def draw(outcomes: Sequence[Outcome], path: str) -> None:
    """Writes one row of two charts for each comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(outcomes), 2, figsize=(11, 4 * len(outcomes)), squeeze=False, layout="constrained"
    )
    for (loss_axes, time_axes), outcome in zip(grid, outcomes, strict=True):
        runs = (outcome.baseline, outcome.candidate)
        titles = [variant.title for variant in outcome.comparison.variants]
        steps = range(1, len(outcome.baseline.losses) + 1)
        styles: tuple[dict[str, Any], dict[str, Any]] = (
            {"linewidth": 3.0, "alpha": 0.45},
            {"linewidth": 1.2, "color": "black"},
        )
        for run, title, style in zip(runs, titles, styles, strict=True):
            loss_axes.plot(steps, run.losses, label=title, **style)
        loss_axes.set_title(f"Loss (largest difference {outcome.largest_difference:.1e})")
        loss_axes.set_xlabel("step")
        loss_axes.set_ylabel("cross entropy, nats a token")
        loss_axes.legend()
        for run, title, style in zip(runs, titles, styles, strict=True):
            milliseconds = [seconds * 1e3 for seconds in run.step_seconds]
            time_axes.plot(steps, milliseconds, label=title, **style)
        time_axes.set_ylim(0, 1.6e3 * max(run.median_step_seconds for run in runs))
        time_axes.set_title(f"Step time (median {outcome.speedup:.2f}x)")
        time_axes.set_xlabel("step")
        time_axes.set_ylabel("ms")
        time_axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
