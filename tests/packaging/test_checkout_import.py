"""``import torch_ext`` from a bare checkout: compiled once, by torch.utils.cpp_extension.load."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkout_copy import run_command
from ways_in import ImportedCheckout

_ATTENTION = """
import torch, torch_ext
x = torch.randn(2, 3, 5, 8)
out = torch_ext.scaled_dot_product_attention(x, x, x)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(x, x, x))
from torch_ext import _C
print(_C.last_attention_path())
"""


def test_refused_where_compiling_is_forbidden(imported_checkout: ImportedCheckout) -> None:
    message = imported_checkout.refusal.strip().splitlines()[-1]
    assert "TORCH_EXT_JIT=0 forbids" in message
    assert "Run `make build` or `pip install --no-build-isolation .` in" in message
    assert str(imported_checkout.checkout) in message


def test_two_first_imports_compile_once_and_say_so(imported_checkout: ImportedCheckout) -> None:
    waiting, loud = sorted(imported_checkout.first_imports, key=len)
    assert waiting.startswith("torch_ext: waiting for another process, which compiles it in ")
    assert waiting.count("\n") == 1
    lines = [line for line in loud.splitlines() if line.startswith("torch_ext: ")]
    assert lines[0].startswith("torch_ext: compiling torch_ext ")
    assert str(imported_checkout.checkout / "build") in lines[0]
    assert lines[1].startswith("torch_ext: compiled in ")
    assert len(lines) == 2


def test_later_imports_take_what_is_there(
    imported_checkout: ImportedCheckout, tmp_path: Path
) -> None:
    forbidden = imported_checkout.environment | {"TORCH_EXT_JIT": "0"}
    done = run_command([sys.executable, "-c", _ATTENTION], tmp_path, forbidden)
    assert done.stdout.startswith("cpu.")
    assert done.stderr == ""
    report = [sys.executable, "-m", "torch_ext", "--json"]
    facts = json.loads(run_command(report, tmp_path, forbidden).stdout)
    assert facts["compiled_at_import"] is True
    assert facts["cmake_prefix_path"] is None
    assert Path(facts["library"]).is_relative_to(imported_checkout.checkout / "build")


@contextmanager
def _changed(source: Path) -> Iterator[None]:
    before = source.read_text()
    source.write_text(before + "// changed\n")
    try:
        yield
    finally:
        source.write_text(before)


def test_changed_sources_are_noticed(imported_checkout: ImportedCheckout, tmp_path: Path) -> None:
    forbidden = imported_checkout.environment | {"TORCH_EXT_JIT": "0"}
    header = imported_checkout.checkout / "csrc" / "kernels" / "strided_view.h"
    with _changed(header):
        done = run_command([sys.executable, "-c", "import torch_ext"], tmp_path, forbidden, 1)
    assert "TORCH_EXT_JIT=0 forbids" in done.stderr
    run_command([sys.executable, "-c", "import torch_ext"], tmp_path, forbidden)
