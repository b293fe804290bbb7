"""Which model classes "torch_ext" serves: those of "sdpa", and those that only sinks keep from it.

transformers asks a class whether it supports an implementation only where the name contains "sdpa",
"flex_attention" or "flash_attention". Classes that never heard of AttentionInterface would accept
"torch_ext" and then add its boolean mask to their scores as numbers.
"""

from __future__ import annotations

from typing import Any

from torch_ext.integrations.transformers import hub_code, sdpa_classes

NAME = "torch_ext"

# They claim neither "sdpa" nor other backends, because of sinks that differ from token to token.
_WITH_SINKS = frozenset({"inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"})

# They refuse "sdpa" for a term of their attention, not for its mask, which they only pass on. All
# others that refuse it get eager's mask: DeepSeek V4 appends a bias, as numbers, to the one it has.
_ANY_MASK = frozenset(
    {
        "flint",
        "gemma2",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "mimo_v2_flash",
        "openai_privacy_filter",
        "t5_gemma_module",
        "t5gemma",
        "vaultgemma",
    }
)

_eager_mask_types: set[str] = set()


def takes_eager_mask(config: Any) -> bool:
    """Whether models of this configuration were written for eager's additive mask alone."""
    return getattr(config, "model_type", None) in _eager_mask_types


def check(model: Any, is_init_check: bool = False) -> None:
    """Raises where "torch_ext" would leave a part of the model's attention out.

    Raises:
        ValueError: "sdpa"'s own, with this implementation's name before it.
    """
    model_type = getattr(model.config, "model_type", "")
    try:
        model._sdpa_can_dispatch(is_init_check)
    except ValueError as error:
        if not (model._supports_attention_backend or model_type in _WITH_SINKS):
            raise ValueError(f'attn_implementation="{NAME}": {error}') from error
        if model_type not in _ANY_MASK:
            _eager_mask_types.add(model_type)
    sdpa_classes.add(type(model), NAME)
    hub_code.warn_where_sdpa_is_asked_for(type(model), NAME)
