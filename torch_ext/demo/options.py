"""The demo's command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """Everything that decides what a run computes. Plain values, so that it travels as JSON."""

    steps: int = 30
    batch_size: int = 4
    seq_len: int = 1024
    micro_batches: int = 4
    layers: int = 4
    heads: int = 2
    embed_dim: int = 128
    dropout: float = 0.0
    # From 4e-3 on training is chaotic: rounding alone drives two stock runs apart.
    learning_rate: float = 1.5e-3
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    seed: int = 1234
    threads: int | None = None
    text: str | None = None
    sample_length: int = 160

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _positive(kind: str, minimum: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"{kind} takes a whole number of at least {minimum}, got {text!r}"
            )
        return value

    return parse


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"takes a number in [0, 1), got {text!r}")
    return value


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"takes a number above 0, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m torch_ext.demo",
        description="Train a small GPT on the Python standard library's own source, first with "
        "stock PyTorch, then with torch_ext, and compare losses, speed and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=_positive("--layers"), default=default.layers)
    model.add_argument("--heads", type=_positive("--heads"), default=default.heads)
    model.add_argument("--embed-dim", type=_positive("--embed-dim"), default=default.embed_dim)
    model.add_argument(
        "--dropout",
        type=_probability,
        default=default.dropout,
        help="of attention weights and block outputs; the two runs then draw different masks, so "
        "their losses agree only on average",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_positive("--steps"), default=default.steps)
    training.add_argument(
        "--batch-size",
        type=_positive("--batch-size"),
        default=default.batch_size,
        help="sequences a step",
    )
    training.add_argument(
        "--seq-len",
        type=_positive("--seq-len", 2),
        default=default.seq_len,
        help="tokens a sequence",
    )
    training.add_argument(
        "--micro-batches",
        type=_positive("--micro-batches"),
        default=default.micro_batches,
        help="parts that the second comparison cuts each step's sequences into; at most as many "
        "as there are sequences",
    )
    training.add_argument("--learning-rate", type=_learning_rate, default=default.learning_rate)
    training.add_argument(
        "--dtype", choices=DTYPES, default=default.dtype, help="bfloat16: through torch.autocast"
    )
    training.add_argument("--device", default=default.device, help="cpu, cuda or cuda:N")
    training.add_argument("--compile", action="store_true", help="train the torch.compile'd model")
    training.add_argument("--seed", type=int, default=default.seed)
    training.add_argument(
        "--threads",
        type=_positive("--threads"),
        default=None,
        help="torch's default when not given",
    )
    training.add_argument(
        "--text", metavar="FILE", help="learn this file instead of the standard library"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--plot", metavar="FILE", help="draw loss curves and step times (PNG, SVG, PDF)"
    )
    output.add_argument(
        "--json", metavar="FILE", help="write every figure; - writes to stdout only"
    )
    output.add_argument(
        "--sample-length",
        type=_positive("--sample-length", 0),
        default=default.sample_length,
        help="tokens of generated text to print",
    )
    return parser


@dataclass(frozen=True)
class Request:
    """A parsed command line: what to compute, and where to write it."""

    options: Options
    plot: str | None
    json: str | None


def parse(argv: Sequence[str] | None = None) -> Request:
    """Parses and cross-checks a command line; exits with status 2 and a message if wrong."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    plot, json = arguments.pop("plot"), arguments.pop("json")
    options = Options(**arguments)
    if options.embed_dim % options.heads != 0:
        parser.error(
            f"--embed-dim takes a multiple of --heads ({options.heads}), got {options.embed_dim}"
        )
    if options.embed_dim // options.heads % 2 != 0:
        parser.error(
            "--embed-dim divided by --heads takes an even number, for rotary positions; got "
            f"{options.embed_dim // options.heads}"
        )
    return Request(options=options, plot=plot, json=json)
