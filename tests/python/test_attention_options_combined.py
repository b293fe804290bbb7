"""All options of a score at once, drawn at random, against the formula."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from option_checks import call_tensors, check_options, check_second_order
from torch import Tensor


class Draw:
    """One call: shapes, and each option with even odds."""

    def __init__(self, seed: int, dtype: torch.dtype, longest: int) -> None:
        self.random = random.Random(seed)
        self.dtype = dtype
        kv_heads = self.random.choice([1, 2])
        self.heads = kv_heads * self.random.choice([1, 1, 2, 3])
        self.q_len = self.random.choice([1, 2, 5, longest // 2, longest])
        self.kv_len = self.random.randint(1, longest)
        self.batch = self.random.choice([1, 2, 3])
        self.tensors: list[Tensor | None] = list(
            call_tensors(
                (self.batch, self.heads, self.q_len, 8),
                (self.batch, kv_heads, self.kv_len, 8),
                dtype,
                (self.batch, kv_heads, self.kv_len, self.random.choice([4, 8])),
            )
        )
        self.options: dict[str, Any] = {"enable_gqa": True}
        self._choose()

    def _maybe(self) -> bool:
        return self.random.random() < 0.5

    def _bound(self) -> int:
        return self.random.choice([-1, 0, self.random.randint(1, self.kv_len + 4)])

    def _choose(self) -> None:
        options, dtype = self.options, self.dtype
        options["is_causal"] = self._maybe()
        options["causal_lower_right"] = self._maybe()
        options["causal_offset"] = self.random.choice([0, 0, -2, 3])
        if self._maybe():
            options["window_size"] = (self._bound(), self._bound())
        if self._maybe():
            options["softcap"] = self.random.choice([0.8, 4.0])
        if self._maybe():
            shape = self.random.choice([(self.heads,), (self.batch, self.heads), (1,)])
            options["alibi_slopes"] = torch.rand(shape) / 4
        if self._maybe():
            options["key_padding_mask"] = torch.rand(self.batch, self.kv_len) < 0.25
        if self._maybe():
            options["scale"] = self.random.choice([0.3, 1.0])
        mask = None
        if not options["is_causal"] and self._maybe():
            shape = (self.batch, self.heads, self.q_len, self.kv_len)
            shape = tuple(size if self._maybe() else 1 for size in shape)
            mask = torch.rand(shape) < 0.7
            if self._maybe():
                mask = torch.randn(shape, dtype=dtype).requires_grad_()
        self.tensors.append(mask)
        self.sink = None
        if self._maybe():
            self.sink = torch.randn(self.heads, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients(seed: int, dtype: torch.dtype, dropout_p: float) -> None:
    draw = Draw(seed, dtype, longest=150)
    seed_tensor = torch.tensor([seed]) if dropout_p else None
    check_options(
        *draw.tensors, sink=draw.sink, dropout_p=dropout_p, dropout_seed=seed_tensor, **draw.options
    )


@pytest.mark.parametrize("seed", range(12))
def test_twice(seed: int) -> None:
    draw = Draw(seed, torch.float64, longest=6)
    check_second_order(*draw.tensors, draw.sink, **draw.options)


def test_dropout_twice() -> None:
    draw = Draw(3, torch.float64, longest=6)
    check_second_order(
        *draw.tensors, draw.sink, dropout_p=0.4, dropout_seed=torch.tensor([5]), **draw.options
    )
