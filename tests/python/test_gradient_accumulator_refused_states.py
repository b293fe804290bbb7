"""load_state_dict refuses a state that is not one, names what is wrong, and leaves the window."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import GradientAccumulator

State = dict[str, Any]


def _half_full(micro_batches: int, dtype: torch.dtype = torch.float32) -> GradientAccumulator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    accumulator = GradientAccumulator(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for number in range(2 + micro_batches):
        with accumulator.micro_batch(weight=2.0):
            model(torch.randn(2, 4).to(dtype)).float().square().sum().backward()
        if number == 1:
            accumulator.step()
    return accumulator


def _entries(accumulator: GradientAccumulator) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in accumulator.state_dict().items()}


def _put(name: str, value: Any) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


def _changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


def _without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def _freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


_NAN_PAIR = torch.tensor([1.0, math.nan], dtype=torch.float64)

# The state, and what the message says.
_CASES: dict[str, tuple[Callable[[State], Any], str]] = {
    "no mapping": (lambda state: [1, 2], "load_state_dict.. takes a dict of tensors, got list"),
    "none": (lambda state: None, "takes a dict of tensors, got NoneType"),
    "a key that is no name": (_put(5, torch.ones(1)), "takes names of entries, got 5"),  # type: ignore[arg-type]
    "an array": (_changed("weight", Tensor.numpy), "'weight' takes a tensor, got ndarray"),
    "a number": (_put("micro_batches", 2), "'micro_batches' takes a tensor, got int"),
    "empty": (lambda state: {}, "without 'micro_batches'"),
    "unknown": (_put("sum.9.weight", torch.ones(1)), "unknown entry 'sum.9.weight'"),
    "unknown shape": (_put("shape.9", torch.ones(1).long()), "4 parameters, got one with 5"),
    "another shape": (_put("shape.0.bias", torch.tensor([4])), r"0.bias has sizes \[3\], got"),
    "shape of floats": (_put("shape.0.bias", torch.tensor([3.0])), "'shape.0.bias' takes Long"),
    "negative weight": (_put("weight", -_NAN_PAIR), "'weight' takes finite weights >= 0, got -1"),
    "infinite weight": (_put("weight", _NAN_PAIR / 0), "'weight' takes finite weights >= 0"),
    "negative weight in a tensor": (
        _put("weight", torch.tensor([0.0, -3.0], dtype=torch.float64)),
        "'weight' takes finite weights >= 0",
    ),
    "weight of one element": (_put("weight", _NAN_PAIR[:1]), r"'weight' takes sizes \[2\], got"),
    "weight in float32": (_changed("weight", Tensor.float), "'weight' takes Double, got Float"),
    "complex weight": (
        _changed("weight", lambda t: t.to(torch.complex64)),
        "'weight' takes Double",
    ),
    "negative first weight": (_put("first_weight", -_NAN_PAIR), "'first_weight' takes finite"),
    "negative count": (_put("micro_batches", torch.tensor(-3)), ">= 0, got -3"),
    "count of floats": (_put("micro_batches", torch.tensor(2.0)), "'micro_batches' takes Long"),
    "two counts": (
        _put("micro_batches", torch.ones(2).long()),
        "'micro_batches' takes one element",
    ),
    "no count": (_put("micro_batches", torch.ones(0).long()), "'micro_batches' takes one element"),
    "sums without micro-batches": (
        lambda state: _without("first_square")(state) | {"micro_batches": torch.tensor(0)},
        "takes a window with a micro-batch",
    ),
    "no first square": (_without("first_square"), "without 'first_square'"),
    "negative first square": (_changed("first_square", lambda t: -t), "'first_square' takes a num"),
    "noise that is not finite": (_changed("noise", lambda t: t * math.nan), "'noise' takes finite"),
    "noise of three": (_put("noise", torch.ones(3).double()), "'noise' takes sizes"),
}
for _kind in ("sum", "master"):
    for _label, _change, _message in (
        ("complex", lambda t: t.to(torch.complex64), "takes Float, Double, BFloat16 or Half, got"),
        ("whole numbers", lambda t: t.long(), "takes Float, Double, BFloat16 or Half, got Long"),
        ("sparse", lambda t: t.to_sparse(), "takes a dense tensor, got layout Sparse"),
        ("meta", lambda t: t.to("meta"), "takes a tensor with memory, got one on meta"),
        ("freed", _freed, "takes a tensor with memory, got one whose storage was freed"),
        ("transposed", lambda t: t.t(), r"takes sizes \[3, 4\], got \[4, 3\]"),
        (
            "quantized",
            lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            "takes Float, Double, BFloat16 or Half, got QInt8",
        ),
    ):
        # The last of what is restored would be noticed after the rest was written.
        _name = f"{_kind}.0.weight"
        _CASES[f"{_kind}, {_label}"] = (_changed(_name, _change), f"'{_name}' {_message}")
_CASES["the last sum"] = (_changed("sum.2.bias", lambda t: t.to("meta")), "'sum.2.bias' takes")


@pytest.mark.parametrize(("change", "message"), _CASES.values(), ids=_CASES.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized tensors are deprecated
def test_a_refused_state_changes_nothing(change: Callable[[State], Any], message: str) -> None:
    accumulator = _half_full(3, torch.bfloat16)
    before = _entries(accumulator)
    state = change(_entries(_half_full(2, torch.bfloat16)))
    with pytest.raises((TypeError, RuntimeError), match=message):
        accumulator.load_state_dict(state)
    after = _entries(accumulator)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_inside_a_micro_batch() -> None:
    accumulator = _half_full(1)
    state = _entries(_half_full(2))
    with accumulator.micro_batch(), pytest.raises(RuntimeError, match="inside a micro_batch"):
        accumulator.load_state_dict(state)
    assert accumulator.micro_batches == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_of_any_floating_dtype_and_layout(dtype: torch.dtype) -> None:
    state = _entries(_half_full(2))
    narrow = {name: t.to(dtype) if name.startswith("sum") else t for name, t in state.items()}
    narrow["sum.0.weight"] = narrow["sum.0.weight"].t().contiguous().t()
    accumulator = _half_full(3)
    accumulator.load_state_dict(narrow)
    for name, tensor in accumulator.state_dict().items():
        torch.testing.assert_close(tensor, narrow[name].to(tensor.dtype), equal_nan=True)


def test_masters_of_a_model_that_was_narrower() -> None:
    accumulator = _half_full(1)
    accumulator.load_state_dict(_entries(_half_full(2, torch.bfloat16)))
    assert accumulator.micro_batches == 2
    assert not any(name.startswith("master") for name in accumulator.state_dict())
