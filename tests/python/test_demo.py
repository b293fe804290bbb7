"""python -m torch_ext.demo: both runs, the figures, the options, and the errors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding, same_but_for_rounding

import torch_ext
from torch_ext.demo import __main__ as demo
from torch_ext.demo.comparison import ATTENTION, COMPARISONS, MICRO_BATCHES, find_variant
from torch_ext.demo.corpus import CorpusError, draw_batch, load_corpus
from torch_ext.demo.options import Options, parse
from torch_ext.demo.peak_memory import PeakMemory
from torch_ext.demo.plot import PlotError, check_plot
from torch_ext.demo.report import Outcome, format_outcome
from torch_ext.demo.tokenizer import WordTokenizer
from torch_ext.demo.training import RunResult, TrainingError, train
from torch_ext.demo.worker import RunFailed, run_in_subprocess

_ROOT = Path(__file__).resolve().parents[2]
_TINY_FLAGS = {
    "--steps": "4",
    "--batch-size": "2",
    "--seq-len": "48",
    "--layers": "2",
    "--heads": "2",
    "--embed-dim": "32",
    "--sample-length": "6",
}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.py"
    path.write_bytes((_ROOT / "torch_ext/demo/training.py").read_bytes() * 3)
    return str(path)


@pytest.fixture
def tiny(text: str) -> Options:
    return Options(
        steps=4,
        batch_size=2,
        seq_len=48,
        layers=2,
        heads=2,
        embed_dim=32,
        text=text,
        sample_length=6,
    )


def _result(losses: list[float], **changes: object) -> RunResult:
    result = RunResult(
        variant="stock",
        losses=losses,
        step_seconds=[0.02] * len(losses),
        validation_loss=losses[-1],
        peak_memory_mib=100.0,
        parameters=1000,
        tokens_per_step=96,
        threads=1,
        corpus="text",
        attention_path="torch",
        schedule="one batch",
        sample="def f():",
    )
    return dataclasses.replace(result, **changes)


def test_command_line_trains_both_comparisons_and_writes_everything(tmp_path: Path) -> None:
    plot, figures = tmp_path / "curves.png", tmp_path / "figures.json"
    flags = [part for pair in _TINY_FLAGS.items() for part in pair]
    run = subprocess.run(
        [sys.executable, "-m", "torch_ext.demo", *flags, "--plot", plot, "--json", figures],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(torch_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for expected in (
        "the curves agree",
        "step time",
        "tokens per second",
        "peak memory",
        "written by",
    ):
        assert expected in run.stdout
    # Not a terminal: whole lines, no bar that redraws itself.
    assert "torch_ext          4/4 steps" in run.stderr
    assert "\r" not in run.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    outcome, windows = json.loads(figures.read_text())
    stock, fused = outcome["runs"]
    assert [stock["variant"], fused["variant"]] == ["stock", "torch_ext"]
    assert len(stock["losses"]) == len(fused["losses"]) == 4
    assert outcome["largest_loss_difference"] <= same_but_for_rounding(torch.float32) * max(
        stock["losses"]
    )
    assert stock["attention_path"] == "torch"
    assert fused["attention_path"].startswith("cpu.")
    assert stock["peak_memory_mib"] > 0
    assert fused["peak_memory_mib"] > 0
    assert [run["schedule"].split(" parts")[0] for run in windows["runs"]] == ["2", "2"]
    assert windows["agrees"]
    assert len(windows["runs"][0]["losses"]) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_variants_learn_the_same(tiny: Options, dtype: str) -> None:
    options = dataclasses.replace(tiny, dtype=dtype)
    stock, fused = (train(variant, options) for variant in ATTENTION.variants)
    assert not torch_ext.is_enabled()
    losses = (torch.tensor([*run.losses, run.validation_loss]) for run in (stock, fused))
    assert_same_but_for_rounding(*losses, getattr(torch, dtype))
    assert fused.attention_path.startswith("cpu.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_learn_as_one_batch(tiny: Options, dtype: str) -> None:
    options = dataclasses.replace(tiny, dtype=dtype, batch_size=3, micro_batches=2)
    whole = train(ATTENTION.candidate, options)
    loop, accumulated = (train(variant, options) for variant in MICRO_BATCHES.variants)
    for run in (loop, accumulated):
        losses = (torch.tensor(variant.losses) for variant in (run, whole))
        assert_same_but_for_rounding(*losses, getattr(torch, dtype))
    assert loop.schedule == "2 parts in turn"
    assert accumulated.schedule.startswith("2 parts")


def test_on_one_thread_micro_batches_follow_each_other(
    tiny: Options, set_num_threads: Callable[[int], None]
) -> None:
    set_num_threads(1)
    one, two = (
        train(variant, dataclasses.replace(tiny, threads=1)) for variant in MICRO_BATCHES.variants
    )
    assert two.schedule == "2 parts in turn"
    assert_same_but_for_rounding(torch.tensor(one.losses), torch.tensor(two.losses))


def test_a_run_repeats_exactly(tiny: Options) -> None:
    options = dataclasses.replace(tiny, dropout=0.1)
    first, second = (train(ATTENTION.candidate, options) for _ in range(2))
    assert first.losses == second.losses
    assert first.sample == second.sample
    other_seed = train(ATTENTION.candidate, dataclasses.replace(options, seed=5))
    assert other_seed.losses != first.losses


def test_compile_trains_the_compiled_model(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    train(ATTENTION.candidate, dataclasses.replace(tiny, steps=1, compile=True))
    assert len(compiled) == 1


def test_curves_that_differ_are_said_and_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    runs = {"torch_ext": _result([3.0, 2.5], attention_path="cpu.x")}
    monkeypatch.setattr(
        demo,
        "run_in_subprocess",
        lambda variant, options: runs.get(variant.name, _result([3.0, 2.0])),
    )
    assert demo.main(["--steps", "2", "--text", text, "--seq-len", "32"]) == 1
    assert "THE CURVES DIFFER" in capsys.readouterr().out


def test_dropout_curves_are_not_compared() -> None:
    outcome = Outcome(ATTENTION, _result([3.0]), _result([2.0]), Options(dropout=0.1))
    assert outcome.agrees
    assert "own dropout masks" in format_outcome(outcome)


def test_median_leaves_the_first_steps_out() -> None:
    run = _result([1.0] * 20, step_seconds=[9.0] * 5 + [0.5] * 15)
    assert run.median_step_seconds == 0.5
    assert run.tokens_per_second == 192.0


def test_json_to_stdout_is_nothing_but_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(demo, "run_in_subprocess", lambda variant, options: _result([3.0, 2.0]))
    assert demo.main(["--text", text, "--seq-len", "32", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["agrees"] is True
    assert "the curves agree" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps takes a whole number of at least 1, got '0'"),
        (["--layers", "two"], "--layers takes a whole number of at least 1, got 'two'"),
        (["--dropout", "1"], "takes a number in [0, 1), got '1'"),
        (["--learning-rate", "-1"], "takes a number above 0, got '-1'"),
        (["--heads", "3"], "--embed-dim takes a multiple of --heads (3), got 128"),
        (["--heads", "128"], "takes an even number"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_bad_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu9"], "--device takes cpu, cuda or cuda:N, got 'tpu9'"),
        (["--device", "meta"], "--device takes cpu, cuda or cuda:N, got 'meta'"),
        (["--text", "/no/such/file"], "cannot read /no/such/file"),
        (["--plot", "curves.bmp"], "--plot takes a file ending in .png"),
        (["--plot", "/no/such/folder/curves.png"], "there is no folder /no/such/folder"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_run_is_said_before_training(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    if "--text" not in flags:
        flags = [*flags, "--text", text, "--seq-len", "32"]
    assert demo.main(flags) == 2
    assert message in capsys.readouterr().err


def test_text_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two three")
    with pytest.raises(CorpusError, match="too few for sequences of 64"):
        load_corpus(str(short), 64)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Options) -> None:
    with pytest.raises(TrainingError, match="try a smaller --learning-rate"):
        train(ATTENTION.baseline, dataclasses.replace(tiny, steps=20, learning_rate=1e30))


def test_an_error_in_the_child_reaches_the_terminal(
    tiny: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunFailed) as error:
        run_in_subprocess(ATTENTION.candidate, dataclasses.replace(tiny, text="/no/such/file"))
    assert error.value.explained
    assert "cannot read /no/such/file" in capfd.readouterr().err


def test_plot_formats(tmp_path: Path) -> None:
    check_plot(str(tmp_path / "a.svg"))
    with pytest.raises(PlotError, match=r"got .*a\.txt"):
        check_plot(str(tmp_path / "a.txt"))


def test_tokens_spell_the_text_they_came_from() -> None:
    text = (_ROOT / "torch_ext/demo/model.py").read_bytes()
    tokenizer = WordTokenizer(text, 300)
    assert tokenizer.vocabulary == 300
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    assert len(tokens) < len(text)
    everything = bytes(range(256)) * 2
    assert tokenizer.decode(tokenizer.encode(everything).tolist()) == everything


def test_batches_are_shifted_by_one_and_stay_inside() -> None:
    tokens = torch.arange(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        inputs, targets = draw_batch(tokens, 3, 47, generator)
        assert inputs.shape == targets.shape == (3, 47)
        assert torch.equal(inputs + 1, targets)
        assert int(targets.max()) <= 49


def test_standard_library_is_found() -> None:
    corpus = load_corpus(None, 1024)
    assert "standard library" in corpus.name
    assert len(corpus.training) > 500_000
    assert len(corpus.validation) > 1024


def test_peak_memory_sees_what_has_been_freed() -> None:
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(24 << 20)  # 96 MiB
    del block
    assert 90 < memory.mib() < 400


def test_variants_are_found_by_name() -> None:
    for comparison in COMPARISONS:
        for variant in comparison.variants:
            assert find_variant(variant.name) is variant
    with pytest.raises(KeyError):
        find_variant("nobody")
