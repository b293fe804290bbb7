"""Fused attention and mini-batch kernels for PyTorch, as a drop-in."""

from pathlib import Path

import torch

torch.ops.load_library(Path(__file__).parent / "lib" / "libtorch_ext.so")

from torch_ext import _C  # noqa: E402, F401
