"""register() and unregister(): the name "torch_ext" in transformers' registries."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch_ext.integrations.transformers import families, masks, sdpa_classes
from torch_ext.integrations.transformers.attention import attention_forward
from torch_ext.integrations.transformers.families import NAME

# 4.54 has no PreTrainedModel.get_correct_attn_implementation yet, 4.57 has.
_OLDEST = "4.57"

_TAKES = f"torch_ext.integrations.transformers takes transformers {_OLDEST} or newer"


def register() -> None:
    """Registers "torch_ext" with AttentionInterface and AttentionMaskInterface; again, harmlessly.

    AttentionInterface has no way to ask a model class whether it takes an implementation, so
    ``PreTrainedModel.get_correct_attn_implementation`` is wrapped, through which every name passes:
    "torch_ext" is checked there, every other name goes on untouched. ``unregister()`` undoes it.

    Raises:
        ImportError: without transformers, with one that is too old, or with one that does not
            import; its cause is the exception that says why.
    """
    library = _import("transformers")
    version = getattr(library, "__version__", "an unknown version")
    try:
        masking = _import("transformers.masking_utils", version)
        model_class = _import("transformers.modeling_utils", version).PreTrainedModel
        interface = library.AttentionInterface
        mask_interface = masking.AttentionMaskInterface
        stock_masks = masking.ALL_MASK_ATTENTION_FUNCTIONS
        stock = model_class.get_correct_attn_implementation
    except AttributeError as error:
        raise ImportError(f"{_TAKES}, got {version}: {error}") from error
    masks.use(sdpa=stock_masks["sdpa"], eager=stock_masks["eager"])
    interface.register(NAME, attention_forward)
    mask_interface.register(NAME, masks.attention_mask)
    if not hasattr(stock, "_torch_ext_stock"):
        model_class.get_correct_attn_implementation = _checked(stock)


def unregister() -> None:
    """Takes "torch_ext" out of transformers again. Models that run on it need it: unregister last.

    Harmless where it is not registered.
    """
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface._global_mapping.pop(NAME, None)
    masking.AttentionMaskInterface._global_mapping.pop(NAME, None)
    current = modeling.PreTrainedModel.get_correct_attn_implementation
    if hasattr(current, "_torch_ext_stock"):
        modeling.PreTrainedModel.get_correct_attn_implementation = current._torch_ext_stock
    sdpa_classes.remove()


def _checked(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        name = stock(self, requested_attention, is_init_check)
        if name == NAME:
            families.check(self, is_init_check)
        return name

    get_correct_attn_implementation._torch_ext_stock = stock  # type: ignore[attr-defined]
    return get_correct_attn_implementation


def _import(name: str, version: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            got = f"{version}: {error}" if version else "none: pip install transformers"
            raise ImportError(f"{_TAKES}, got {got}") from error
        raise _broken(version, error) from error
    except Exception as error:  # a broken dependency may raise anything
        raise _broken(version, error) from error


def _broken(version: str | None, error: BaseException) -> ImportError:
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return ImportError(
        f"torch_ext.integrations.transformers: transformers{f' {version}' if version else ''} "
        f"cannot be imported here: {type(root).__name__}: {root}"
    )
