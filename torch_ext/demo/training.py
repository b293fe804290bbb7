"""One training run: the model, the loop, and what is measured of it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ext
from torch_ext.native_library import loaded

from .comparison import Variant
from .corpus import Corpus, draw_batch, load_corpus
from .model import GPT, generate
from .options import Options
from .peak_memory import PeakMemory
from .progress import Progress
from .training_loops import AccumulatedMicroBatches, OneBatch, StockMicroBatches, TrainingLoop

_PROMPT = b"\n    def "
_VALIDATION_BATCHES = 4


class TrainingError(Exception):
    """A run cannot start or went wrong, with what to do about it."""


@dataclass(frozen=True)
class RunResult:
    """What one run measured; plain values, so that it travels as JSON."""

    variant: str
    losses: list[float]
    step_seconds: list[float]
    validation_loss: float
    peak_memory_mib: float
    parameters: int
    tokens_per_step: int
    threads: int
    corpus: str
    attention_path: str
    schedule: str
    sample: str

    @property
    def median_step_seconds(self) -> float:
        """Without the first five steps (half of a shorter run), which warm up or compile."""
        settled = self.step_seconds[min(5, len(self.step_seconds) // 2) :]
        return statistics.median(settled)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.median_step_seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_device(options: Options) -> torch.device:
    """The device to train on; raises TrainingError when it is not there."""
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise TrainingError(
            f"--device takes cpu, cuda or cuda:N, got {options.device!r}"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--device takes cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("--device cuda: this torch sees no CUDA device")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise TrainingError(
                f"--device {options.device}: there are {torch.cuda.device_count()} CUDA devices"
            )
        if loaded.build_info["cuda_version"] is None:
            raise TrainingError("--device cuda: this torch_ext was built without CUDA kernels")
    return device


def build_model(options: Options, vocabulary: int) -> GPT:
    """The untrained model, from torch's current random state."""
    return GPT(
        vocabulary,
        options.seq_len,
        options.layers,
        options.heads,
        options.embed_dim,
        options.dropout,
    )


class Trainer:
    """Model, optimizer and the step of one run.

    Args:
        variant: how each step goes.
        options: what to train.
        corpus: the text.
        device: where.
    """

    def __init__(
        self, variant: Variant, options: Options, corpus: Corpus, device: torch.device
    ) -> None:
        self.options = options
        self.corpus = corpus
        self.device = device
        torch.manual_seed(options.seed)
        self.model = build_model(options, corpus.tokenizer.vocabulary).to(device)
        self.compiled: nn.Module = self.model
        if options.compile:
            self.compiled = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.loop = self._loop_of(variant)

    def _loop_of(self, variant: Variant) -> TrainingLoop:
        arguments = (self.compiled, self.optimizer, self.loss_sum)
        parts = min(self.options.micro_batches, self.options.batch_size)
        if variant.loop == "stock micro-batches":
            return StockMicroBatches(*arguments, parts)
        if variant.loop == "accumulated micro-batches":
            return AccumulatedMicroBatches(*arguments, parts)
        return OneBatch(*arguments)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the first tenth, then a cosine down to a tenth of the peak."""
        warmup = max(1, self.options.steps // 10)
        if step < warmup:
            return self.options.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.options.steps - warmup)
        return self.options.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.options.dtype))

    def loss_sum(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy of ``(batch, seq)`` tokens."""
        with self.autocast():
            logits = model(inputs.to(self.device))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.to(self.device).flatten(), reduction="sum"
        )

    def step(self, step: int, inputs: Tensor, targets: Tensor) -> float:
        """One optimizer step; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        return self.loop.step(inputs, targets)

    @torch.no_grad()
    def validation_loss(self) -> float:
        generator = torch.Generator().manual_seed(self.options.seed)
        self.model.eval()
        losses = []
        for _ in range(_VALIDATION_BATCHES):
            batch = draw_batch(
                self.corpus.validation, self.options.batch_size, self.options.seq_len, generator
            )
            losses.append(self.loss_sum(self.model, *batch).item() / batch[1].numel())
        self.model.train()
        return statistics.fmean(losses)

    def sample(self) -> str:
        """Text that the trained model writes."""
        tokenizer = self.corpus.tokenizer
        generator = torch.Generator().manual_seed(self.options.seed)
        with self.autocast():
            tokens = generate(
                self.model, tokenizer.encode(_PROMPT), self.options.sample_length, generator
            )
        return tokenizer.decode(tokens.tolist()).decode("utf-8", errors="replace").strip("\n")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def train(variant: Variant, options: Options) -> RunResult:
    """Trains from the seed with what ``variant`` switches on.

    Raises TrainingError or CorpusError when the run cannot start or a loss is not finite.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = check_device(options)
    corpus = load_corpus(options.text, options.seq_len)
    memory = PeakMemory(device)
    with torch_ext.enabled(cuda=True) if variant.fused_attention else contextlib.nullcontext():
        trainer = Trainer(variant, options, corpus, device)
        generator = torch.Generator().manual_seed(options.seed)
        losses: list[float] = []
        step_seconds: list[float] = []
        with Progress(variant.title, options.steps) as progress:
            for step in range(options.steps):
                batch = draw_batch(corpus.training, options.batch_size, options.seq_len, generator)
                started = time.perf_counter()
                loss = trainer.step(step, *batch)
                trainer.synchronize()
                step_seconds.append(time.perf_counter() - started)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"{variant.title}: the loss of step {step + 1} is {loss}; "
                        "try a smaller --learning-rate"
                    )
                losses.append(loss)
                progress.advance(loss)
        peak = memory.mib()
        path = torch_ext.last_attention_path() if variant.fused_attention else "torch"
        return RunResult(
            variant=variant.name,
            losses=losses,
            step_seconds=step_seconds,
            validation_loss=trainer.validation_loss(),
            peak_memory_mib=peak,
            parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
            tokens_per_step=options.batch_size * options.seq_len,
            threads=torch.get_num_threads(),
            corpus=corpus.name,
            attention_path=path,
            schedule=trainer.loop.schedule,
            sample=trainer.sample(),
        )
