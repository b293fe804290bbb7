"""``python -m torch_ext.demo``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import torch_ext

from .comparison import COMPARISONS, Comparison
from .corpus import Corpus, CorpusError, load_corpus
from .options import Options, Request, parse
from .plot import PlotError, check_plot, draw
from .report import Outcome, format_outcome, format_setup, outcome_to_json
from .training import TrainingError, check_device
from .worker import RunFailed, run_in_subprocess


def _check(request: Request) -> Corpus:
    """Finds out what would fail after minutes, and reads the text."""
    check_device(request.options)
    corpus = load_corpus(request.options.text, request.options.seq_len)
    if request.plot is not None:
        check_plot(request.plot)
    if request.json not in (None, "-") and not Path(request.json).resolve().parent.is_dir():
        raise TrainingError(f"--json: there is no folder {Path(request.json).resolve().parent}")
    return corpus


def _options_for(comparison: Comparison, options: Options) -> Options:
    """A comparison of fewer steps writes no text: there is a better trained model for that."""
    steps = comparison.steps(options.steps)
    sample_length = options.sample_length if comparison.part_of_steps == 1.0 else 0
    return dataclasses.replace(options, steps=steps, sample_length=sample_length)


def _run(request: Request, corpus: Corpus) -> int:
    say = sys.stderr if request.json == "-" else sys.stdout
    build = f"torch {torch.__version__}, torch_ext {torch_ext.__version__}"
    print(f"{format_setup(request.options, corpus, build)}\n", file=say, flush=True)
    outcomes: list[Outcome] = []
    for comparison in COMPARISONS:
        options = _options_for(comparison, request.options)
        runs = [run_in_subprocess(variant, options) for variant in comparison.variants]
        outcome = Outcome(comparison, runs[0], runs[1], options)
        print(f"\n{format_outcome(outcome)}", file=say, flush=True)
        outcomes.append(outcome)
    if request.plot is not None:
        draw(outcomes, request.plot)
        print(f"\nLoss curves and step times: {request.plot}", file=say)
    if request.json is not None:
        text = json.dumps([outcome_to_json(outcome) for outcome in outcomes], indent=2)
        if request.json == "-":
            print(text)
        else:
            Path(request.json).write_text(text + "\n")
    return 0 if all(outcome.agrees for outcome in outcomes) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0 when all loss curves agree, 1 when not, 2 on bad input."""
    request = parse(argv)
    try:
        return _run(request, _check(request))
    except (TrainingError, CorpusError, PlotError) as error:
        print(f"torch_ext.demo: error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        if not error.explained:
            print(f"torch_ext.demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntorch_ext.demo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
