"""Tiny random Hugging Face models: no network, no weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TWO_KV_HEADS = {**_SIZES, "num_key_value_heads": 2}
_SLIDING = ["sliding_attention", "full_attention"]

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_TWO_KV_HEADS),
    "mistral": lambda: transformers.MistralConfig(**_TWO_KV_HEADS, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**_TWO_KV_HEADS),
    "qwen3": lambda: transformers.Qwen3Config(**_TWO_KV_HEADS, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_TWO_KV_HEADS, head_dim=16, sliding_window=5, layer_types=_SLIDING
    ),
    "phi": lambda: transformers.PhiConfig(**_SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
}


def decoder(name: str, implementation: str, **changes: Any) -> Any:
    config = DECODERS[name]()
    for option, value in changes.items():
        setattr(config, option, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    # Random logits lie so close together that rounding may change the best token.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The cache under the name that this version of the library has for it."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def tokens(batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str, batch: int = 3, length: int = 12) -> Tensor:
    """(batch, length): 1 = token, 0 = padding on the side named."""
    lengths = torch.tensor([length, 5, 9])[:batch, None]
    mask = (torch.arange(length) < lengths).long()
    return mask.flip(1) if side == "left" else mask
