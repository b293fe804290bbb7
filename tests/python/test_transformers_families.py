"""Fifty families on attn_implementation="torch_ext"; `make check-families` tries all there are."""

from __future__ import annotations

import pytest
import torch
from family_inputs import make_inputs
from family_verdicts import build, judge, model_classes
from tiny_configurations import tiny_configuration

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

DECODERS = (
    "cohere2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "falcon", "flint", "gemma",
    "gemma2", "gemma3_text", "glm4", "glm_moe_dsa", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "granite_swa", "hy_v4", "inkling2_text", "llama", "minimax_m3_vl_text", "mistral",
    "olmo2", "opt", "phi", "qwen2", "qwen3", "starcoder2",
)  # fmt: skip
ENCODERS = ("albert", "bert", "distilbert", "electra", "modernbert", "openai_privacy_filter")
ENCODER_DECODERS = ("bart", "t5", "whisper")
VISION = ("clip", "data2vec-vision", "dinov2", "sam_vision_model", "vit")
MULTIMODAL = ("llava", "paligemma")
REFUSED = {
    "bloom": "does not support", "led": "does not support",
    "mpnet": "does not support", "mpt": "does not support", "roformer": "does not support",
    "tapas": "does not support", "xglm": "does not support",
}  # fmt: skip
FUSED = (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION, *MULTIMODAL)


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


def test_there_are_fifty():
    assert len({*FUSED, *REFUSED}) == 50


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_with_stock_numbers(model_type):
    """Outputs and gradients, without padding and with it on either side."""
    verdict = judge(model_type)
    assert (verdict.status, verdict.reason) == ("fused", "")
    assert verdict.sdpa in ("fused", "")  # with the drop-in; "" where sdpa itself refuses
    if model_type not in VISION:
        assert {"none", "right"} <= set(verdict.paddings)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_the_reason(model_type):
    verdict = judge(model_type)
    assert verdict.status == "refused"
    assert verdict.reason.startswith("ValueError")
    assert REFUSED[model_type] in verdict.reason


@pytest.mark.parametrize("model_type", DECODERS)
def test_greedy_generation_with_a_cache_is_that_of_eager(model_type):
    config = tiny_configuration(model_type)
    model_class = next(c for c in model_classes(model_type) if c.can_generate())
    eager = build(model_class, config, "eager")
    ours = build(model_class, config, "torch_ext", eager.state_dict())
    inputs = make_inputs(eager, "left").tensors
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    found = [model.generate(**inputs, **options) for model in (ours, eager)]
    assert torch.equal(*found)
