"""The lists of translation units: everything is compiled, once, under a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from checkout_copy import ROOT

_CSRC = ROOT / "csrc"
_LISTS = ("sources_cpu.txt", "sources_cuda.txt")
# The Python module has a library of its own; the reference is the tests' alone.
_ELSEWHERE = ("ops/python_module.cpp", "kernels/reference/")


def _lines(name: str) -> list[str]:
    lines = (_CSRC / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _compiled(source: str) -> list[str]:
    """The listed file, and the .cpp files that it includes."""
    included = re.findall(r'#include "(.+\.cpp)"', (_CSRC / source).read_text())
    return included if source.startswith("units/") else [source, *included]


def test_every_source_is_compiled_once() -> None:
    compiled = Counter(file for name in _LISTS for line in _lines(name) for file in _compiled(line))
    files = [
        str(path.relative_to(_CSRC)) for suffix in ("*.cpp", "*.cu") for path in _CSRC.rglob(suffix)
    ]
    expected = [file for file in files if not file.startswith(("units/", *_ELSEWHERE))]
    assert compiled == Counter(expected)


@pytest.mark.parametrize("name", _LISTS)
def test_source_names_are_unique(name: str) -> None:
    """cpp_extension.load() names an object file after its source file, without the folder."""
    stems = [Path(line).stem for line in _lines(name)]
    assert len(stems) == len(set(stems))


def test_the_operators_without_cuda_need_no_cuda() -> None:
    for line in _lines("sources_cpu.txt"):
        assert not [file for file in _compiled(line) if file.endswith("_cuda.cpp")], line
