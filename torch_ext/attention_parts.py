"""Attention over parts of the keys, merged into attention over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_attention"]


def merge_attention(outs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What one call over all keys gives, from calls over parts of them.

    Args:
        outs: each part's out, (..., q_len, value_dim), of one shape and floating dtype.
        logsumexps: each part's logsumexp, (..., q_len), as ``attention_forward`` returns it. A part
            that a query does not attend to has out 0 and logsumexp -inf.

    Returns:
        (out, logsumexp) of the union of the parts, in their shapes and dtypes, differentiable. A
        query that attends to nothing in any part has out 0 and logsumexp -inf. A sink belongs into
        the logsumexp of one part.

    Raises:
        ValueError: naming the argument, what it takes and what it got.
    """
    if not outs or len(outs) != len(logsumexps):
        raise ValueError(
            "torch_ext.merge_attention: outs and logsumexps take one tensor for each part, at "
            f"least one, got {len(outs)} and {len(logsumexps)}"
        )
    for part, (out, logsumexp) in enumerate(zip(outs, logsumexps, strict=True)):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            raise ValueError(
                f"torch_ext.merge_attention: outs[{part}] takes the shape and dtype of the first, "
                f"{tuple(outs[0].shape)} {outs[0].dtype}, got {tuple(out.shape)} {out.dtype}"
            )
        if logsumexp.shape != out.shape[:-1] or logsumexp.dtype != logsumexps[0].dtype:
            raise ValueError(
                f"torch_ext.merge_attention: logsumexps[{part}] takes the shape of outs without "
                f"value_dim, {tuple(out.shape[:-1])}, and {logsumexps[0].dtype}, got "
                f"{tuple(logsumexp.shape)} {logsumexp.dtype}"
            )
    parts = torch.stack(tuple(logsumexps))  # (parts, ..., q_len)
    highest = parts.detach().amax(0)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = (parts - highest).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = (weights / total).unsqueeze(-1)
    out = shares[0] * outs[0]
    for part in range(1, len(outs)):
        out = out + shares[part] * outs[part]
    logsumexp = (total.log() + highest).masked_fill(empty, -math.inf)
    return out.to(outs[0].dtype), logsumexp
