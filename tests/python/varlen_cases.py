"""Packed sequences to test: lengths, options, and the formula sequence by sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_reference import attention
from torch import Tensor


def cumulative(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Where sequences of these lengths begin, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@dataclass(frozen=True)
class VarlenCase:
    """One call. Lengths of sequences, heads, and options of torch_ext.varlen_attn."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 40
    value_dim: int = 24
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""  # "heads" or "sequences"
    sink: bool = False
    unused: bool = False  # seqused_k leaves some keys out
    tail: tuple[int, int] = (0, 0)  # rows behind the last sequence
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lens = "-".join(map(str, self.q_lens[:6])) + "x" + "-".join(map(str, self.k_lens[:6]))
        names = [lens, f"h{self.heads}/{self.kv_heads}", f"d{self.head_dim}/{self.value_dim}"]
        names += [f"w{self.window_size}"] if self.window_size != (-1, -1) else []
        names += ["cap"] if self.softcap else []
        names += [f"alibi-{self.alibi}"] if self.alibi else []
        names += ["sink"] if self.sink else []
        names += ["used"] if self.unused else []
        return "_".join(names).replace(" ", "")

    def tensors(self, dtype: torch.dtype) -> VarlenTensors:
        """Random tensors of the case; floating ones require gradients."""

        def rows(count: int, heads: int, columns: int) -> Tensor:
            return torch.randn(count, heads, columns, dtype=torch.float64).to(dtype)

        total_q = sum(self.q_lens) + self.tail[0]
        total_k = sum(self.k_lens) + self.tail[1]
        result = VarlenTensors(
            self,
            rows(total_q, self.heads, self.head_dim).requires_grad_(),
            rows(total_k, self.kv_heads, self.head_dim).requires_grad_(),
            rows(total_k, self.kv_heads, self.value_dim).requires_grad_(),
        )
        if self.sink:
            result.sink = torch.randn(self.heads, dtype=torch.float64).to(dtype).requires_grad_()
        if self.alibi:
            shape = (self.heads,) if self.alibi == "heads" else (len(self.q_lens), self.heads)
            result.alibi_slopes = torch.rand(shape)
        if self.unused:
            result.used = [length - length // 3 for length in self.k_lens]
        return result


@dataclass
class VarlenTensors:
    """The operands of one call."""

    case: VarlenCase
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None = None
    alibi_slopes: Tensor | None = None
    used: list[int] | None = None

    @property
    def differentiable(self) -> list[Tensor]:
        tensors = [self.query, self.key, self.value]
        return tensors if self.sink is None else [*tensors, self.sink]

    def double(self) -> VarlenTensors:
        """The same numbers in float64, leaves of their own."""
        return VarlenTensors(
            self.case,
            *(t.detach().double().requires_grad_() for t in (self.query, self.key, self.value)),
            sink=None if self.sink is None else self.sink.detach().double().requires_grad_(),
            alibi_slopes=self.alibi_slopes,
            used=self.used,
        )

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of torch_ext.varlen_attn."""
        case = self.case
        positional = (
            self.query,
            self.key,
            self.value,
            cumulative(case.q_lens),
            cumulative(case.k_lens),
            max(case.q_lens, default=0),
            max(case.k_lens, default=0),
        )
        options: dict[str, Any] = {
            "window_size": case.window_size,
            "enable_gqa": True,
            "softcap": case.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sink": self.sink,
            **case.options,
        }
        if self.used is not None:
            options["seqused_k"] = torch.tensor(self.used, dtype=torch.int32)
        return positional, options

    def sequence(self, index: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Of attention_reference.attention, for one sequence."""
        case = self.case
        first_q, first_k = sum(case.q_lens[:index]), sum(case.k_lens[:index])
        kv_len = case.k_lens[index] if self.used is None else self.used[index]
        query = self.query[first_q : first_q + case.q_lens[index]].transpose(0, 1)
        key, value = (t[first_k : first_k + kv_len].transpose(0, 1) for t in (self.key, self.value))
        slopes = self.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[index]
        options = {
            "enable_gqa": True,
            "window_size": case.window_size,
            "causal_lower_right": True,
            "softcap": case.softcap,
            "alibi_slopes": slopes,
            "sink": self.sink,
            **case.options,
        }
        return (query, key, value), options


def varlen_reference(tensors: VarlenTensors) -> tuple[Tensor, Tensor]:
    """(out, logsumexp) by the formula of attention_reference, float64."""
    case = tensors.case
    outs, logsumexps = [], []
    for index in range(len(case.q_lens)):
        operands, options = tensors.sequence(index)
        out, logsumexp = attention(*operands, **options)
        outs.append(out.transpose(0, 1))
        logsumexps.append(logsumexp)
    rows = case.tail[0]
    outs.append(torch.zeros(rows, case.heads, case.value_dim, dtype=torch.float64))
    logsumexps.append(torch.full((case.heads, rows), -torch.inf, dtype=torch.float64))
    return torch.cat(outs), torch.cat(logsumexps, 1)
