"""Fused attention and mini-batch kernels for PyTorch, as a drop-in."""

from torch_ext.native_library import PACKAGE, loaded

__version__: str = loaded.build_info["version"]

cmake_prefix_path: str = str(PACKAGE / "share" / "cmake")
"""For ``-DCMAKE_PREFIX_PATH=``: where an installed package has the files of ``find_package``."""

from torch_ext import data, flop_formulas
from torch_ext.attention import (
    attention_forward,
    last_attention_path,
    scaled_dot_product_attention,
    self_attention,
)
from torch_ext.attention_parts import merge_attention
from torch_ext.gradient_accumulation import GradientAccumulator
from torch_ext.paged_cache import append_kv_
from torch_ext.parallel_accumulation import parallel_micro_batches
from torch_ext.sdpa_override import disable, enable, enabled, is_enabled
from torch_ext.varlen import varlen_attn

__all__ = [
    "GradientAccumulator",
    "__version__",
    "append_kv_",
    "attention_forward",
    "cmake_prefix_path",
    "data",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "last_attention_path",
    "merge_attention",
    "parallel_micro_batches",
    "scaled_dot_product_attention",
    "self_attention",
    "varlen_attn",
]

flop_formulas.install()
