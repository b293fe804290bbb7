"""Model code outside of transformers that compares the implementation's name with "sdpa"."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

_FILE = """
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
{head}

class HubModel(PreTrainedModel):
    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.projection = nn.Linear(4, 4)
        self.post_init()

    def forward(self, x):
        q = k = v = self.projection(x)
        {body}
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v
"""

_SDPA = "return nn.functional.scaled_dot_product_attention(q, k, v)"
_IMPORT = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS"


@pytest.fixture
def hub_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    head, body = request.param
    name = "modeling_hub_" + str(abs(hash((head, body))))
    (tmp_path / f"{name}.py").write_text(_FILE.format(head=head, body=body))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(name)
    del sys.modules[name]


def _made(module: ModuleType, implementation: str) -> list[str]:
    config = transformers.LlamaConfig(hidden_size=4, num_attention_heads=1)
    config._attn_implementation = implementation
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.HubModel(config)
    return [str(warning.message) for warning in caught if "torch_ext" in str(warning.message)]


@pytest.mark.parametrize(
    "hub_module",
    [
        ("", f'if self.config._attn_implementation == "sdpa": {_SDPA}'),
        ("", f'if "sdpa" == self.config._attn_implementation: {_SDPA}'),
        ("", f'if self.config._attn_implementation in ("sdpa", "flash_attention_2"): {_SDPA}'),
        ("", f'attn_implementation = "eager"\n        if attn_implementation != "sdpa": {_SDPA}'),
    ],
    indirect=True,
)
def test_it_is_named_once_with_the_way_that_works(hub_module: ModuleType) -> None:
    assert _made(hub_module, "sdpa") == []
    (message,) = _made(hub_module, "torch_ext")
    assert "HubModel" in message
    assert hub_module.__name__ in message
    assert 'Call torch_ext.enable() and load it with attn_implementation="sdpa"' in message
    assert _made(hub_module, "torch_ext") == []


@pytest.mark.parametrize(
    "hub_module",
    [
        ("", 'kind = "sdpa"'),  # no comparison
        ("", f'if self.config.model_type == "sdpa": {_SDPA}'),
        (_IMPORT, f'if self.config._attn_implementation == "sdpa": {_SDPA}'),
        ('HUB_ATTENTION_CLASSES = {"eager": 1}', f'if self.attn_implementation == "sdpa": {_SDPA}'),
    ],
    indirect=True,
)
def test_code_that_asks_a_registry_is_not_named(hub_module: ModuleType) -> None:
    assert _made(hub_module, "torch_ext") == []


def test_transformers_own_models_are_not_named() -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = transformers.AutoModel.from_config(config, attn_implementation="torch_ext")
    assert isinstance(made, torch.nn.Module)
