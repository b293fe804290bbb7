"""What is measured, as data: one entry a workload, with the ratio against torch it has to reach."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Pass = Literal["forward", "forward_backward"]
Mask = Literal["none", "additive", "additive_learned", "half_padding", "sliding_window"]
Operator = Literal["attention", "self_attention"]


@dataclass(frozen=True)
class Workload:
    """One attention call. batch 2, 8 heads, 1024 queries and keys of 64 unless said.

    Attributes:
        name: unique; what ``--only`` matches.
        group: "target" (has a ratio to reach), "sweep" (must not be slower than torch), "extra".
        dtype: "float32", "bfloat16", "float16".
        measured: "forward" (under no_grad) or "forward_backward".
        mask: "additive" (1, heads, q_len, kv_len), "additive_learned" (with its gradient too),
            "half_padding" (batch, 1, 1, kv_len) boolean, the second half of the keys ignored,
            "sliding_window" (1, 1, q_len, kv_len) boolean, causal, ``window`` keys a query.
        heads_last: query, key and value are (batch, seq, heads, dim) in memory, as a projection
            leaves them, instead of contiguous.
        ratio: torch's time over ours, at least; None: no figure was set.
        peak_fraction: of the measured multiply-add peak, at least.
        bandwidth_fraction: of the measured read bandwidth, at least.
    """

    name: str
    dtype: str
    measured: Pass
    group: Literal["target", "sweep", "extra"] = "target"
    operator: Operator = "attention"
    batch: int = 2
    query_heads: int = 8
    kv_heads: int = 8
    q_len: int = 1024
    kv_len: int = 1024
    head_dim: int = 64
    causal: bool = False
    dropout: float = 0.0
    mask: Mask = "none"
    window: int = 128
    heads_last: bool = False
    ratio: float | None = None
    peak_fraction: float | None = None
    bandwidth_fraction: float | None = None

    @property
    def attended_pairs(self) -> float:
        """(query, key) pairs of one head that take part: what useful work is counted by."""
        q, k = self.q_len, self.kv_len
        if self.mask == "half_padding":
            return q * (k - k // 2)
        if self.mask == "sliding_window":
            return sum(min(i + 1, self.window, k) for i in range(q))
        if self.causal:
            return sum(min(i + 1, k) for i in range(q))
        return q * k

    @property
    def flops(self) -> float:
        """Multiply-adds counted twice: two products forward, five more backward."""
        products = 2 if self.measured == "forward" else 7
        pairs = self.batch * self.query_heads * self.attended_pairs
        work = 2.0 * products * pairs * self.head_dim
        if self.operator == "self_attention":
            embed = self.query_heads * self.head_dim
            projections = 2.0 * self.batch * self.q_len * embed * 4 * embed
            work += projections * (1 if self.measured == "forward" else 3)
        return work

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values: what a decode step must read at least."""
        element = 4 if self.dtype == "float32" else 2
        return 2.0 * self.batch * self.kv_heads * self.kv_len * self.head_dim * element

    def shrunk(self) -> Workload:
        """The same kind of call in a hundredth of the time, to see that everything runs."""
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            query_heads=max(1, self.query_heads // max(1, self.kv_heads // 2)),
            kv_heads=min(self.kv_heads, 2),
            q_len=min(self.q_len, 65) if self.q_len > 16 else self.q_len,
            kv_len=min(self.kv_len, 65) if self.q_len > 16 else min(self.kv_len, 130),
            window=min(self.window, 8),
            head_dim=min(self.head_dim, 32),
            ratio=None,
            peak_fraction=None,
            bandwidth_fraction=None,
        )


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _family(title: str, measured: Pass, ratios: dict[str, float | None], **shape) -> list[Workload]:
    """One workload a dtype, named "TITLE, PASS, DTYPE"."""
    suffix = "forward" if measured == "forward" else "forward + backward"
    return [
        Workload(
            name=f"{title}, {suffix}, {_SHORT[dtype]}",
            dtype=dtype,
            measured=measured,
            ratio=ratio,
            **shape,
        )
        for dtype, ratio in ratios.items()
    ]


def _targets() -> list[Workload]:
    both: Pass = "forward_backward"
    full = _family("full", "forward", {"float32": 1.2, "bfloat16": 2.2, "float16": 1.5})
    peaks = {"float32": 0.85, "bfloat16": 0.78}
    full = [dataclasses.replace(w, peak_fraction=peaks.get(w.dtype)) for w in full]
    causal = _family("causal", "forward", {"float32": 1.7, "bfloat16": 2.8}, causal=True)
    peaks = {"float32": 0.78, "bfloat16": 0.66}
    causal = [dataclasses.replace(w, peak_fraction=peaks[w.dtype]) for w in causal]
    decode = {"q_len": 1, "kv_len": 8192, "head_dim": 128, "bandwidth_fraction": 0.85}
    return [
        *full,
        *causal,
        *_family("full", both, {"float32": 1.25, "bfloat16": 1.7}),
        *_family("causal", both, {"float32": 1.7, "bfloat16": 2.3}, causal=True),
        *_family("full B1 S512", both, {"float16": 6.0}, batch=1, q_len=512, kv_len=512),
        *_family("dropout 0.1", both, {"float32": 2.0, "bfloat16": 3.0}, dropout=0.1),
        *_family("additive mask", both, {"float32": 1.2, "bfloat16": 1.7}, mask="additive"),
        *_family("half padding", both, {"bfloat16": 3.0}, mask="half_padding"),
        *_family(
            "sliding window 128 S2048",
            "forward",
            {"bfloat16": 5.0},
            mask="sliding_window",
            q_len=2048,
            kv_len=2048,
        ),
        *_family(
            "one head S4096 D128",
            both,
            {"float32": 1.8, "bfloat16": 1.7},
            batch=1,
            query_heads=1,
            kv_heads=1,
            q_len=4096,
            kv_len=4096,
            head_dim=128,
        ),
        *_family(
            "GQA 32/8 causal D128",
            both,
            {"bfloat16": 2.2},
            query_heads=32,
            kv_heads=8,
            head_dim=128,
            causal=True,
        ),
        *_family(
            "short B32 H12 S128",
            both,
            {"float32": 1.25, "bfloat16": 1.7},
            batch=32,
            query_heads=12,
            kv_heads=12,
            q_len=128,
            kv_len=128,
        ),
        *_family(
            "self_attention B4 S512 E512 causal",
            both,
            {"float32": 1.25, "bfloat16": 1.4},
            operator="self_attention",
            batch=4,
            q_len=512,
            kv_len=512,
            causal=True,
        ),
        *_family(
            "tiny B8 H4 S32 D32",
            "forward",
            {"float32": 1.1},
            batch=8,
            query_heads=4,
            kv_heads=4,
            q_len=32,
            kv_len=32,
            head_dim=32,
        ),
        *_family(
            "tiny B8 H4 S32 D32",
            both,
            {"bfloat16": 2.0},
            batch=8,
            query_heads=4,
            kv_heads=4,
            q_len=32,
            kv_len=32,
            head_dim=32,
        ),
        *_family("decode 8192 keys D128", "forward", {"float32": 2.5, "bfloat16": 8.0}, **decode),
        *_family(
            "decode GQA 32/8, 4096 keys D128",
            "forward",
            {"bfloat16": 20.0},
            query_heads=32,
            q_len=1,
            kv_len=4096,
            head_dim=128,
        ),
        *_family("16 queries, 4096 keys", "forward", {"bfloat16": 3.0}, q_len=16, kv_len=4096),
    ]


def _sweep() -> list[Workload]:
    """Shapes off the beaten track: none may be slower than torch."""
    level: dict[str, float | None] = {"float32": 1.0, "bfloat16": 1.0}
    shapes: list[tuple[str, dict]] = [
        ("D32", {"head_dim": 32}),
        ("D80", {"head_dim": 80}),
        ("D96", {"head_dim": 96}),
        ("D256", {"head_dim": 256}),
        ("odd lengths 1023 x 1023", {"q_len": 1023, "kv_len": 1023}),
        ("odd lengths 509 x 777", {"q_len": 509, "kv_len": 777}),
        ("odd D71 S997", {"head_dim": 71, "q_len": 997, "kv_len": 997}),
        ("one batch, one head S1024", {"batch": 1, "query_heads": 1, "kv_heads": 1}),
        (
            "many batches B256 H4 S64",
            {"batch": 256, "query_heads": 4, "kv_heads": 4, "q_len": 64, "kv_len": 64},
        ),
        ("medium B4 S256", {"batch": 4, "q_len": 256, "kv_len": 256}),
        ("cross attention 128 x 4096", {"q_len": 128, "kv_len": 4096}),
        ("projection layout", {"heads_last": True}),
        ("tiny B1 H8 S16", {"batch": 1, "q_len": 16, "kv_len": 16}),
    ]
    swept: list[Workload] = []
    for title, shape in shapes:
        for measured in ("forward", "forward_backward"):
            swept += _family(title, measured, level, group="sweep", **shape)
    decode = [
        ("decode 512 keys", {"kv_len": 512}),
        ("decode B16 1024 keys", {"batch": 16, "kv_len": 1024}),
        ("decode GQA 32/8, 4096 keys", {"query_heads": 32, "kv_len": 4096}),
        ("4 queries, 2048 keys", {"q_len": 4, "kv_len": 2048}),
    ]
    for title, shape in decode:
        swept += _family(title, "forward", level, group="sweep", **{"q_len": 1, **shape})
    return swept


def _extra() -> list[Workload]:
    """What torch has no fused kernel for, or where nobody set a figure."""
    open_ended: dict[str, float | None] = {"float32": None, "bfloat16": None}
    return [
        *_family(
            "additive mask with its gradient",
            "forward_backward",
            open_ended,
            group="extra",
            mask="additive_learned",
        ),
        *_family("full", "forward_backward", {"float16": None}, group="extra"),
        *_family(
            "self_attention B4 S512 E512 causal",
            "forward",
            open_ended,
            group="extra",
            operator="self_attention",
            batch=4,
            q_len=512,
            kv_len=512,
            causal=True,
        ),
    ]


WORKLOADS: tuple[Workload, ...] = (*_targets(), *_sweep(), *_extra())


def select(only: str | None = None, groups: tuple[str, ...] = ("target",)) -> list[Workload]:
    """Workloads of ``groups``; with ``only``, those of any group whose name has all its words.

    Words are separated by spaces and matched without regard to case: "causal bf16 backward".
    """
    if only is None:
        return [w for w in WORKLOADS if w.group in groups]
    words = only.lower().split()
    return [w for w in WORKLOADS if all(word in w.name.lower() for word in words)]
