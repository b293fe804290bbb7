"""register() and unregister() of the transformers integration, and why they cannot."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers_models import decoder

from torch_ext.integrations import transformers as torch_ext_hf


@pytest.fixture(autouse=True)
def _registered():
    torch_ext_hf.register()
    yield
    torch_ext_hf.register()


def registered() -> tuple[object, ...]:
    return (
        dict(transformers.AttentionInterface._global_mapping),
        dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
        PreTrainedModel.get_correct_attn_implementation,
    )


def test_registering_twice_is_harmless_and_changes_nothing_else():
    before = registered()
    torch_ext_hf.register()
    assert registered() == before
    assert before[0]["torch_ext"] is torch_ext_hf.attention_forward
    assert before[1]["torch_ext"] is torch_ext_hf.attention_mask


def test_unregister_gives_transformers_back():
    falcon = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.AutoModel.from_config(falcon, attn_implementation="torch_ext")
    classes = importlib.import_module(
        "transformers.models.falcon.modeling_falcon"
    ).FALCON_ATTENTION_CLASSES
    assert "torch_ext" in classes

    torch_ext_hf.unregister()
    torch_ext_hf.unregister()
    attention, masks, check = registered()
    assert "torch_ext" not in attention
    assert "torch_ext" not in masks
    assert check.__module__ == "transformers.modeling_utils"
    assert not hasattr(check, "__wrapped__")
    assert "torch_ext" not in classes
    with pytest.raises(ValueError, match='"torch_ext"` is not supported'):
        decoder("llama", "torch_ext")


def test_other_implementations_are_not_checked():
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=97)
    for implementation in (None, "eager"):
        model = transformers.AutoModel.from_config(bloom, attn_implementation=implementation)
        assert model.config._attn_implementation == "eager"


def register_where(prelude: str) -> str:
    program = f"""
import sys
{prelude}
from torch_ext.integrations import transformers
try:
    transformers.register()
except ImportError as error:
    print(error)
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    print("because of", root)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_missing_transformers_is_named():
    printed = register_where('sys.modules["transformers"] = None')
    assert "takes transformers 4.57 or newer, got none: pip install transformers" in printed


@pytest.mark.parametrize(
    ("error", "module"),
    [("ModuleNotFoundError", "cache_utils"), ("RuntimeError", "masking_utils")],
)
def test_a_broken_dependency_is_named_not_the_version(error, module):
    printed = register_where(f"""
class Broken:
    def find_spec(self, name, path, target=None):
        if name == "transformers.{module}":
            raise {error}("No module named 'termcolor'")
sys.meta_path.insert(0, Broken())
""")
    message, cause = printed.strip().splitlines()
    assert f"transformers {transformers.__version__} cannot be imported here" in message
    assert message.endswith(f"{error}: No module named 'termcolor'")
    assert cause == "because of No module named 'termcolor'"


def test_an_old_transformers_is_named(monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = "4.40.0"
    monkeypatch.setitem(sys.modules, "transformers", old)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ImportError, match=r"takes transformers 4\.57 or newer, got 4\.40\.0"):
        torch_ext_hf.register()
