"""Keeps torch.compile's products apart by how the drop-in was switched when they were made.

What a compiled function runs is fixed while it is traced, and nothing that Dynamo guards on changes
with the dispatcher. So at every change of state (off, on, on for CUDA too), the code compiled in
the state that ends gets one more guard: that state. Code of all states stays cached side by side,
and a function that is called in another state is compiled once more, then reused. The caches on
disk, keyed by a graph that looks the same in all states, get the state into their key, and a number
that is raised when the operators' strides change: graphs of an older torch_ext are not taken. With
the drop-in off too, for graphs may call the operators themselves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["compile_lock", "state_changed"]

# (whether the drop-in is on, for CUDA tensors too)
State = tuple[bool, bool]

_OFF: State = (False, False)
_CACHE_KEY_MARKS = {
    _OFF: "torch_ext_off.2",
    (True, False): "torch_ext.2",
    (True, True): "torch_ext_cuda.2",
}

# By csrc/ops/sdpa_override.
_OVERRIDDEN = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._native_multi_head_attention.default,
)

_state = _OFF


def _is_state(state: State) -> Callable[..., bool]:
    def guard(*_: Any) -> bool:
        return _state == state

    return guard


_STATE_GUARDS = {state: _is_state(state) for state in _CACHE_KEY_MARKS}


@contextlib.contextmanager
def compile_lock() -> Iterator[None]:
    """Held, Dynamo compiles nothing in other threads: none straddles a change of state."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is None:
        yield
        return
    with convert_frame.compile_lock:
        yield


def state_changed(enabled: bool, cuda: bool) -> None:
    """The drop-in has just been switched: all that is compiled belongs to the state before."""
    global _state
    before, _state = _state, (enabled, cuda)
    _tie_compiled_code_to(before)
    _mark_cache_key(_state)
    for operator in _OVERRIDDEN:
        # Which kernel the Python dispatcher, under which graphs are traced, found for each key.
        operator._dispatch_cache.clear()
    fake_tensor = sys.modules.get("torch._subclasses.fake_tensor")
    if fake_tensor is not None:
        # Holds, per operator and argument shapes, the strides that the kernel of that time gave.
        fake_tensor.FakeTensorMode.cache_clear()


def _cache_entries() -> Iterator[Any]:
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is None:
        return
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        if code is not None:
            yield from _debug_get_cache_entry_list(code)


def _tie_compiled_code_to(state: State) -> None:
    for entry in _cache_entries():
        manager = entry.guard_manager
        if not hasattr(manager, "torch_ext_state"):
            text = f"torch_ext.is_enabled() is {state[0]}"
            manager.root.add_lambda_guard(_STATE_GUARDS[state], [text], None)
            manager.torch_ext_state = state


def _with_mark(tag: str, state: State) -> str:
    marks = _CACHE_KEY_MARKS.values()
    return "+".join(
        [*(part for part in tag.split("+") if part and part not in marks), _CACHE_KEY_MARKS[state]]
    )


def _mark_cache_key(state: State) -> None:
    config = torch.compiler.config
    # A value assigned to the option counts in the assigning thread alone; the default that an
    # environment variable gives is everybody's.
    entry = config._config["cache_key_tag"]
    default = entry.env_value_default if isinstance(entry.env_value_default, str) else ""
    entry.env_value_default = _with_mark(default, state)
    tag = config.cache_key_tag
    if tag != _with_mark(tag, state):
        config.cache_key_tag = _with_mark(tag, state)


_mark_cache_key(_OFF)
