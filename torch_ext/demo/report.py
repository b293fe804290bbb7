"""What the demo prints: loss curves side by side, speed and memory, generated text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .comparison import Comparison
from .corpus import Corpus
from .options import Options
from .training import RunResult, build_model

# Rounding differences between two correct attentions grow along the run, by a factor of about ten
# every hundred steps; a wrong one misses these limits within ten steps.
_LOSS_LIMITS = {"float32": 0.02, "bfloat16": 0.1}
_CURVE_ROWS = 8


@dataclass(frozen=True)
class Outcome:
    """Both runs of a comparison."""

    comparison: Comparison
    baseline: RunResult
    candidate: RunResult
    options: Options

    @property
    def largest_difference(self) -> float:
        """Between the two loss curves, over all steps."""
        return max(
            abs(a - b) for a, b in zip(self.baseline.losses, self.candidate.losses, strict=True)
        )

    @property
    def loss_limit(self) -> float | None:
        """What the difference must stay below; None with dropout, where the masks differ."""
        return None if self.options.dropout > 0 else _LOSS_LIMITS[self.options.dtype]

    @property
    def agrees(self) -> bool:
        return self.loss_limit is None or self.largest_difference <= self.loss_limit

    @property
    def speedup(self) -> float:
        return self.baseline.median_step_seconds / self.candidate.median_step_seconds


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Left column flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells).rstrip())
    lines.insert(1, "  " + "   ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_setup(options: Options, corpus: Corpus, build: str) -> str:
    """The lines above the first progress bar: what is trained on what."""
    with torch.device("meta"):
        model = build_model(options, corpus.tokenizer.vocabulary)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = options.threads or torch.get_num_threads()
    where = f"{options.device}, {threads} threads" if options.device == "cpu" else options.device
    extras = [f"seed {options.seed}"]
    if options.dropout > 0:
        extras.append(f"dropout {options.dropout}")
    if options.compile:
        extras.append("torch.compile")
    return (
        f"A GPT of {options.layers} layers, {options.heads} heads, width {options.embed_dim} "
        f"({parameters / 1e6:.1f} M parameters) learns {corpus.name}:\n"
        f"{options.steps} steps of {options.batch_size} x {options.seq_len} tokens, "
        f"{options.dtype}, {where}, {', '.join(extras)}; {build}"
    )


def format_curves(outcome: Outcome) -> str:
    """A few points of both loss curves, and whether they agree."""
    steps = len(outcome.baseline.losses)
    count = min(_CURVE_ROWS, steps)
    shown = sorted({round(i * (steps - 1) / max(1, count - 1)) for i in range(count)})
    rows = [
        [
            "step",
            outcome.comparison.baseline.title,
            outcome.comparison.candidate.title,
            "difference",
        ]
    ]
    for step in shown:
        a, b = outcome.baseline.losses[step], outcome.candidate.losses[step]
        rows.append([str(step + 1), f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}"])
    a, b = outcome.baseline.validation_loss, outcome.candidate.validation_loss
    rows.append(["unseen text", f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}"])
    largest = f"largest difference over all {steps} steps: {outcome.largest_difference:.1e}"
    if outcome.loss_limit is None:
        verdict = "not compared, for each run draws its own dropout masks"
    elif outcome.agrees:
        verdict = f"the curves agree (limit {outcome.loss_limit:g})"
    else:
        verdict = f"THE CURVES DIFFER by more than {outcome.loss_limit:g}"
    return f"Loss\n{_table(rows)}\n  {largest}: {verdict}"


def format_measurements(outcome: Outcome) -> str:
    """Step time, throughput and peak memory; ratios above 1 are in the candidate's favour."""
    a, b = outcome.baseline, outcome.candidate

    def ratio(worse: float, better: float) -> str:
        return f"{worse / better:.2f}x" if better > 0 else "-"

    rows = [
        ["", outcome.comparison.baseline.title, outcome.comparison.candidate.title, "ratio"],
        [
            "step time (median)",
            f"{a.median_step_seconds * 1e3:.1f} ms",
            f"{b.median_step_seconds * 1e3:.1f} ms",
            ratio(a.median_step_seconds, b.median_step_seconds),
        ],
        [
            "tokens per second",
            f"{a.tokens_per_second:,.0f}",
            f"{b.tokens_per_second:,.0f}",
            ratio(b.tokens_per_second, a.tokens_per_second),
        ],
        [
            "peak memory of the run",
            f"{a.peak_memory_mib:.0f} MiB",
            f"{b.peak_memory_mib:.0f} MiB",
            ratio(a.peak_memory_mib, b.peak_memory_mib),
        ],
        ["attention ran on", a.attention_path, b.attention_path, ""],
        ["each step", a.schedule, b.schedule, ""],
    ]
    return f"Speed and memory\n{_table(rows)}"


def format_sample(title: str, sample: str) -> str:
    """The text that a trained model wrote."""
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in sample)
    return f"Text written by the {title} model\n" + textwrap.indent(
        printable.rstrip(), "  | ", lambda line: True
    )


def format_outcome(outcome: Outcome) -> str:
    """Everything about one comparison."""
    parts = [outcome.comparison.title, format_curves(outcome), format_measurements(outcome)]
    if outcome.candidate.sample and outcome.options.sample_length > 0:
        parts.append(format_sample(outcome.comparison.candidate.title, outcome.candidate.sample))
    return "\n\n".join(parts)


def outcome_to_json(outcome: Outcome) -> dict[str, object]:
    """Every figure, the printed ones and those they were made from."""
    return {
        "comparison": outcome.comparison.name,
        "options": outcome.options.to_json(),
        "largest_loss_difference": outcome.largest_difference,
        "loss_limit": outcome.loss_limit,
        "agrees": outcome.agrees,
        "speedup": outcome.speedup,
        "runs": [
            run.to_json()
            | {
                "median_step_seconds": run.median_step_seconds,
                "tokens_per_second": run.tokens_per_second,
            }
            for run in (outcome.baseline, outcome.candidate)
        ],
    }
