"""csrc/kernels knows no torch, and nothing includes torch/extension.h."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from checkout_copy import ROOT

_CSRC = ROOT / "csrc"
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
_TORCH = re.compile(r"(torch|ATen|aten|c10|caffe2|pybind11)/|Python\.h")


def _includes(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            for name in _INCLUDE.findall(file.read_text()):
                yield file.relative_to(_CSRC), name


def test_no_torch_in_the_kernels() -> None:
    includes = list(_includes(_CSRC / "kernels"))
    assert len(includes) > 50
    assert [found for found in includes if _TORCH.match(found[1])] == []


def test_kernels_do_not_include_what_lies_above_them() -> None:
    # Quoted paths are relative to csrc/ or to the file.
    assert [found for found in _includes(_CSRC / "kernels") if "ops/" in found[1]] == []


def test_no_file_includes_all_of_torch() -> None:
    everything = ("torch/extension.h", "torch/torch.h", "torch/all.h", "ATen/ATen.h")
    assert [found for found in _includes(_CSRC) if found[1] in everything] == []
