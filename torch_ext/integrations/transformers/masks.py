"""The mask function behind "torch_ext"."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_ext.integrations.transformers import families

_functions: dict[str, Any] = {}


def use(**functions: Any) -> None:
    """transformers' own mask functions: ``sdpa`` and ``eager``."""
    _functions.update(functions)


def attention_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """``sdpa``'s mask: boolean, True = attend, or None where causal or no masking says the same.

    Models that know eager's mask only get that one: additive, and always there.

    Always there too for Gemma 4, which cuts queries off behind the mask's back where only the last
    logits are wanted, unless there is no mask and the implementation is named "sdpa"; and where the
    configuration says bidirectional, as PaliGemma's does: its layers take no mask for no masking,
    while eager has the causal mask that was asked for.
    """
    config = options.get("config")
    if families.takes_eager_mask(config):
        return _functions["eager"](*arguments, **options)
    gemma_4 = str(getattr(config, "model_type", "")).startswith("gemma4")
    if gemma_4 or getattr(config, "use_bidirectional_attention", False):
        options["allow_is_causal_skip"] = False
    return _functions["sdpa"](*arguments, **options)
