"""Compares a model family on attn_implementation="torch_ext" with itself on "eager" and "sdpa".

A tiny random model of the family runs forward and backward, without padding, with it left and with
it right. Its weights are three times the usual, so that attention weights are far from even and a
wrong mask shows: the families that once ignored theirs were off by 2e-2 of the largest output and
more. Rounding is some 1e-6; what sdpa is off by, where a family amplifies it, counts too.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from family_inputs import Inputs, accepts, make_inputs
from tiny_configurations import tiny_configuration
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import torch_ext

TOLERANCE = 1e-3  # of the largest element
SDPA_FACTOR = 8.0  # or so many times what sdpa is off from eager
LARGEST = 40_000_000  # parameters
_MAPPINGS = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "CTC",
    "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "", "MASK_GENERATION",
    "OBJECT_DETECTION", "TIME_SERIES_PREDICTION", "KEYPOINT_MATCHING",
)  # fmt: skip


@dataclass
class Verdict:
    model_type: str
    status: str  # "fused", "refused", "no attention", "wrong", "not built"
    class_name: str = ""
    reason: str = ""
    sdpa: str = ""  # of "sdpa" with the drop-in on: the same words, "" where sdpa itself refuses
    fused_calls: int = 0
    error: float = 0.0
    paddings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def model_classes(model_type: str) -> list[type]:
    found: list[type] = []
    for mapping in _MAPPINGS:
        name = f"MODEL_FOR_{mapping}_MAPPING" if mapping else "MODEL_MAPPING"
        classes = getattr(modeling_auto, name, {}).get(CONFIG_MAPPING[model_type], ())
        found += classes if isinstance(classes, (tuple, list)) else [classes]
    return list(dict.fromkeys(found))


def build(model_class: Any, config: Any, implementation: str, state: Any = None) -> Any:
    torch.manual_seed(0)
    model = model_class._from_config(
        copy.deepcopy(config), attn_implementation=implementation
    ).eval()
    if state is not None:
        model.load_state_dict(state, strict=False)
        return model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(generator=generator)
            elif parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_(3.0)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class _Calls(TorchDispatchMode):
    """Counts calls of torch_ext's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        self.fused += name.startswith("torch_ext::") and "attention_forward" in name
        return func(*args, **(kwargs or {}))


@dataclass
class Run:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    fused: int


def run(model: Any, inputs: Inputs) -> Run:
    model.zero_grad(set_to_none=True)
    options = {"use_cache": False} if accepts(model, "use_cache") else {}
    torch.manual_seed(0)
    calls = _Calls()
    with calls:
        result = model(**inputs.tensors, **options)
    outputs: dict[str, Tensor] = {}
    loss = torch.zeros(())
    for name, value in _floating(result).items():
        seen = inputs.text_mask
        kept = value[seen] if seen is not None and value.shape[:2] == seen.shape else value
        outputs[name] = kept.detach().clone()
        if kept.requires_grad:
            weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5))
            loss = loss + (kept.float() * weights).sum() / max(kept.numel(), 1) ** 0.5
    if loss.requires_grad:
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(outputs, gradients, calls.fused)


def _floating(result: Any, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name in result.keys() if hasattr(result, "keys") else ():
        value = result[name]
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.numel():
                found[prefix + name] = value
        elif not prefix and "past" not in name and "cache" not in name:
            found.update(_floating(value, name + "."))
    return found


def difference(ours: Run, other: Run) -> float:
    """Largest element-wise difference of a tensor, of its largest element; inf where shapes or
    finiteness differ. Gradients that are zero but for rounding are measured by the largest one."""
    return max(
        _difference(ours.outputs, other.outputs, 0.0),
        _difference(ours.gradients, other.gradients, 1e-2),
    )


def _difference(ours: dict[str, Tensor], other: dict[str, Tensor], share: float) -> float:
    if ours.keys() != other.keys():
        return float("inf")
    sizes = [_largest(tensor) for tensor in other.values()]
    worst, least = 0.0, max(share * max(sizes, default=0.0), 1e-6)
    for name, expected in other.items():
        actual = ours[name]
        finite = expected.isfinite()
        if actual.shape != expected.shape or not torch.equal(finite, actual.isfinite()):
            return float("inf")
        off = (actual - expected)[finite].abs().max().item() if finite.any() else 0.0
        worst = max(worst, off / max(_largest(expected), least))
    return worst


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def judge(model_type: str) -> Verdict:
    """Builds the first class of the type that runs under eager or sdpa, and compares."""
    reason = "no class of its own among the auto classes"
    classes = model_classes(model_type)
    if not classes:
        return Verdict(model_type, "not built", reason=reason)
    try:
        config = tiny_configuration(model_type)
    except Exception as error:
        return Verdict(model_type, "not built", reason=f"configuration: {_short(error)}")
    for model_class in classes:
        name = model_class.__name__
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if parameters > LARGEST:
                reason = f"{name} stays too large: {parameters / 1e6:.0f} M parameters"
                continue
            stocks = _stock_models(model_class, config)
            run(next(iter(stocks.values())), make_inputs(next(iter(stocks.values())), None))
        except Exception as error:
            reason = f"{name}: {_short(error)}"
            continue
        return _compare(Verdict(model_type, "", name), model_class, config, stocks)
    return Verdict(model_type, "not built", reason=reason)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _stock_models(model_class: Any, config: Any) -> dict[str, Any]:
    models: dict[str, Any] = {}
    failed: Exception | None = None
    for name in ("eager", "sdpa"):
        state = next(iter(models.values())).state_dict() if models else None
        try:
            models[name] = build(model_class, config, name, state)
        except Exception as error:
            failed = error
    if not models:
        raise failed or AssertionError
    return models


def _compare(
    verdict: Verdict, model_class: Any, config: Any, stocks: dict[str, nn.Module]
) -> Verdict:
    first = next(iter(stocks.values()))
    try:
        ours = build(model_class, config, "torch_ext", first.state_dict())
    except Exception as error:
        verdict.status, verdict.reason = "refused", _short(error)
        ours = None
    calls = dropped_in_calls = 0
    paddings = [None, "left", "right"] if accepts(first, "attention_mask") else [None]
    for padding in paddings:
        try:
            inputs = make_inputs(first, padding)
            if padding and not inputs.are_padded():
                continue
            stock = {name: run(model, inputs) for name, model in stocks.items()}
        except Exception:
            continue  # not a way to call this family
        bound = TOLERANCE
        if len(stock) == 2:
            off = difference(stock["sdpa"], stock["eager"])
            bound = max(bound, min(SDPA_FACTOR * off, 10 * TOLERANCE))
        verdict.paddings.append(padding or "none")
        if ours is not None and verdict.status != "refused":
            calls += _check(verdict, padding, stock, ours, inputs, bound)
        if "sdpa" in stocks:
            with torch_ext.enabled():
                found = run(stocks["sdpa"], inputs)
            dropped_in_calls += found.fused
            if difference(found, stock["sdpa"]) > bound:
                verdict.sdpa = "wrong"
    if not verdict.status:
        verdict.status = "fused" if calls else "no attention"
    if "sdpa" in stocks and not verdict.sdpa:
        verdict.sdpa = "fused" if dropped_in_calls else "no attention"
    verdict.fused_calls = calls
    return verdict


def _check(
    verdict: Verdict,
    padding: str | None,
    stock: dict[str, Run],
    ours: nn.Module,
    inputs: Inputs,
    bound: float,
) -> int:
    try:
        found = run(ours, inputs)
    except Exception as error:
        verdict.status, verdict.reason = "refused", _short(error)
        return 0
    # Eager's numbers, or sdpa's where those two disagree (rows of padding, eager's own faults).
    error = min(difference(found, other) for other in stock.values())
    verdict.error = max(verdict.error, error)
    if error > bound:
        verdict.status, verdict.reason = "wrong", f"padding {padding}: off by {error:.1e}"
    return found.fused
