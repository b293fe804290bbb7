"""Real text that every machine has: the source of the Python standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .tokenizer import WordTokenizer

VOCABULARY = 1024
_MAX_BYTES = 4_000_000
# Other people's packages, tests, and tables that are not code anyone wrote.
_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}


class CorpusError(Exception):
    """No usable text, with what to do about it."""


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        name: what the text is, for people.
        tokenizer: made from this text.
        training: ``(n,)`` int64 tokens to learn.
        validation: ``(m,)`` int64 tokens of another place in the text, never trained on.
    """

    name: str
    tokenizer: WordTokenizer
    training: Tensor
    validation: Tensor


def _standard_library() -> tuple[str, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    total = 0
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_bytes()
        except OSError:
            continue
        parts.append(text)
        total += len(text)
        if total >= _MAX_BYTES:
            break
    if total == 0:
        raise CorpusError(f"{root} holds no Python source: give any text with --text FILE")
    return f"{len(parts)} files of the Python standard library", b"\n".join(parts)


def _file(path: str) -> tuple[str, bytes]:
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(f"--text: cannot read {path}: {error.strerror}") from error


def load_corpus(text: str | None, seq_len: int) -> Corpus:
    """Reads the text file ``text``, or the standard library when it is None.

    One token in 32, and at least a sequence of ``seq_len``, is held out for validation. Raises
    CorpusError when there is no text or it is too short.
    """
    name, content = _standard_library() if text is None else _file(text)
    tokenizer = WordTokenizer(content, VOCABULARY)
    tokens = tokenizer.encode(content)
    held_out = max(len(tokens) // 32, seq_len + 1)
    needed = 4 * held_out
    if len(tokens) < needed:
        raise CorpusError(
            f"{name} has {len(tokens)} tokens, too few for sequences of {seq_len} (needs "
            f"{needed}): give a longer text or a smaller --seq-len"
        )
    middle = len(tokens) // 2
    return Corpus(
        name=name,
        tokenizer=tokenizer,
        training=torch.cat([tokens[:middle], tokens[middle + held_out :]]),
        validation=tokens[middle : middle + held_out],
    )


def draw_batch(
    tokens: Tensor, batch_size: int, seq_len: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random pieces of the text: tokens and their successors, each ``(batch_size, seq_len)``."""
    first = torch.randint(len(tokens) - seq_len, (batch_size, 1), generator=generator)
    pieces = tokens[first + torch.arange(seq_len + 1)]
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
