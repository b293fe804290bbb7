"""torch_ext as an attention implementation of Hugging Face transformers.

    from torch_ext.integrations import transformers as torch_ext_hf
    torch_ext_hf.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="torch_ext")

It is ``attn_implementation="sdpa"`` with torch_ext's kernels under it, whether or not
``torch_ext.enable()`` is on: the same masks and caches, and the same refusals (a family that does
not support "sdpa", soft-capping of logits, attention weights). Key and value heads shared by
several query heads are never repeated, and attention sinks, which "sdpa" has not, are served.
docs/huggingface.md lists the families.
"""

from torch_ext.integrations.trainer import GradientAccumulationMixin
from torch_ext.integrations.transformers.attention import attention_forward
from torch_ext.integrations.transformers.families import NAME
from torch_ext.integrations.transformers.masks import attention_mask
from torch_ext.integrations.transformers.registration import register, unregister

__all__ = [
    "NAME",
    "GradientAccumulationMixin",
    "attention_forward",
    "attention_mask",
    "register",
    "unregister",
]
