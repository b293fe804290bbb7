"""Whole training windows: micro-batches, their accumulation, clipping and the optimizer's step."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accumulation_workloads import OURS, Workload
from torch import Tensor, nn

import torch_ext

Call = Callable[[], object]
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
MICRO_BATCHES = 4
_LR = 1e-6
_MAX_NORM = 1.0
_SEQ = 64


class _MlpBlock(nn.Module):
    """768 - 3072 - 768 and a residual, or as wide as the workload says."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (tokens, width)
        return x + self.contract(F.gelu(self.expand(x)))


class _SmallTransformer(nn.Module):
    """Two layers, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors, which are not for training
            self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq)
        return self.head(self.layers(self.embedding(tokens)))


class Training:
    """A copy of a model with an optimizer of its own; ``window`` is one optimizer step's work.

    Args:
        model: copied.
        loss_of: ``loss_of(model, micro_batch)`` gives the summed loss and its weight.
        micro_batches: of every window.
    """

    def __init__(self, model: nn.Module, loss_of: Loss, micro_batches: Sequence[Any]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LR, fused=True)
        self.loss_of = loss_of
        self.micro_batches = micro_batches

    def window(self) -> None:
        raise NotImplementedError


class _Stock(Training):
    """Plain torch, with the total weight known beforehand."""

    def __init__(self, model: nn.Module, loss_of: Loss, micro_batches: Sequence[Any]) -> None:
        super().__init__(model, loss_of, micro_batches)
        with torch.no_grad():
            self.total = sum(loss_of(self.model, batch)[1] for batch in micro_batches)

    def window(self) -> None:
        for batch in self.micro_batches:
            (self.loss_of(self.model, batch)[0] / self.total).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _StockInOneRegion(_Stock):
    """Casts each weight once a window: autocast's cache lives as long as its region."""

    def window(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            super().window()


class _Accumulated(Training):
    """GradientAccumulator, one micro-batch after the other."""

    def __init__(self, model: nn.Module, loss_of: Loss, micro_batches: Sequence[Any]) -> None:
        super().__init__(model, loss_of, micro_batches)
        self.accumulator = torch_ext.GradientAccumulator(
            self.model, self.optimizer, max_norm=_MAX_NORM
        )

    def window(self) -> None:
        for batch in self.micro_batches:
            with self.accumulator.micro_batch() as micro_batch:
                loss, micro_batch.weight = self.loss_of(self.model, batch)
                loss.backward()
        self.accumulator.step()


class _TwoWorkers(_Accumulated):
    """GradientAccumulator, two micro-batches at once."""

    def window(self) -> None:
        torch_ext.parallel_micro_batches(
            self.accumulator, self.loss_of, self.micro_batches, workers=2
        )
        self.accumulator.step()


def _windows(trainings: dict[str, Training]) -> dict[str, Call]:
    return {name: torch.enable_grad()(training.window) for name, training in trainings.items()}


def mlp_trainings(workload: Workload) -> dict[str, Training]:
    """MLP blocks, one for each two weights, micro-batches one after the other."""
    hidden, width = workload.shapes[0]
    is_mixed = workload.dtype != "float32"
    inputs = [torch.randn(workload.tokens, width) for _ in range(MICRO_BATCHES)]

    def loss_of(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        region: Any = contextlib.nullcontext()
        if is_mixed:
            region = torch.autocast("cpu", dtype=getattr(torch, workload.dtype))
        with region:
            return model(x).float().square().sum(), len(x)

    model = nn.Sequential(*(_MlpBlock(hidden, width) for _ in workload.shapes[::2]))
    trainings: dict[str, Training] = {
        OURS: _Accumulated(model, loss_of, inputs),
        "backward, clip, fused AdamW": _Stock(model, loss_of, inputs),
    }
    if is_mixed:
        trainings["the same in one autocast region"] = _StockInOneRegion(model, loss_of, inputs)
    return trainings


def parallel_trainings(workload: Workload) -> dict[str, Training]:
    """A small transformer, two micro-batches at once."""
    rows = max(1, workload.tokens // _SEQ)
    batches = [
        tuple(torch.randint(256, (rows, _SEQ)) for _ in range(2)) for _ in range(MICRO_BATCHES)
    ]

    def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        tokens, targets = batch
        logits = model(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum"), targets.numel()

    model = _SmallTransformer()
    return {
        OURS: _TwoWorkers(model, loss_of, batches),
        "one after the other, GradientAccumulator": _Accumulated(model, loss_of, batches),
        "one after the other, torch": _Stock(model, loss_of, batches),
    }


def mlp_window(workload: Workload) -> dict[str, Call]:
    """As mlp_trainings, to be called."""
    return _windows(mlp_trainings(workload))


def parallel_window(workload: Workload) -> dict[str, Call]:
    """As parallel_trainings, to be called."""
    return _windows(parallel_trainings(workload))
