"""Text to tokens and back: the commonest words and marks of a text, single bytes for the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

_BYTES = 256
# A line break with the indentation after it; a word, a number or a run of marks, each with the one
# space before it; a run of other white space. Together they cover every byte.
_PIECE = re.compile(rb"\n *| ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\s")


class WordTokenizer:
    """Tokens 0 to 255 are bytes, the others the commonest pieces of the text it was made from.

    Args:
        text: where to count pieces.
        vocabulary: number of tokens at most, the bytes included.
    """

    def __init__(self, text: bytes, vocabulary: int) -> None:
        counts = Counter(_PIECE.findall(text))
        saved = {p: (len(p) - 1) * n for p, n in counts.items() if len(p) > 1 and n > 1}
        # Ties in alphabetical order: the same text gives the same tokens everywhere.
        commonest = sorted(saved, key=lambda piece: (-saved[piece], piece))
        self._pieces = [bytes([byte]) for byte in range(_BYTES)]
        self._pieces += commonest[: max(0, vocabulary - _BYTES)]
        self._token_of = {piece: token for token, piece in enumerate(self._pieces)}

    @property
    def vocabulary(self) -> int:
        return len(self._pieces)

    def encode(self, text: bytes) -> Tensor:
        """Tokens ``(n,)``, int64."""
        token_of = self._token_of
        tokens: list[int] = []
        for piece in _PIECE.findall(text):
            token = token_of.get(piece)
            if token is None:
                tokens.extend(piece)
            else:
                tokens.append(token)
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The text that ``tokens`` stand for."""
        return b"".join(self._pieces[token] for token in tokens)
