"""Families that do not support "sdpa" refuse "torch_ext" with its error, however they are asked."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from rounding_bounds import assert_same_but_for_rounding
from transformers_models import VOCABULARY, decoder, padding, tokens

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

_BERT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# Every kind of attention of its own: ALiBi, cached causal masks, encoders, images, tables.
WITHOUT_SDPA = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=1),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=32, ffn_dim=64, num_layers=1, attention_heads=4
    ),
    "roformer": lambda: transformers.RoFormerConfig(**_BERT_SIZES),
    "megatron-bert": lambda: transformers.MegatronBertConfig(**_BERT_SIZES),
    "mpnet": lambda: transformers.MPNetConfig(**_BERT_SIZES),
    "splinter": lambda: transformers.SplinterConfig(**_BERT_SIZES),
    "vilt": lambda: transformers.ViltConfig(**_BERT_SIZES, image_size=16, patch_size=8),
    "led": lambda: transformers.LEDConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        attention_window=4,
    ),
}  # fmt: skip


@pytest.fixture(params=WITHOUT_SDPA)
def config(request):
    return WITHOUT_SDPA[request.param]()


def refusal(config, implementation: str) -> str:
    with pytest.raises(ValueError, match="does not support an attention implementation") as raised:
        transformers.AutoModel.from_config(
            copy.deepcopy(config), attn_implementation=implementation
        )
    return str(raised.value)


def test_refused_with_the_error_of_sdpa(config):
    expected = refusal(config, "sdpa")
    assert refusal(config, "torch_ext") == f'attn_implementation="torch_ext": {expected}'


def test_refused_through_the_configuration(config):
    config._attn_implementation = "torch_ext"
    with pytest.raises(ValueError, match=r'attn_implementation="torch_ext": .* does not support'):
        transformers.AutoModel.from_config(config)


def test_refused_after_construction():
    model = transformers.AutoModel.from_config(
        WITHOUT_SDPA["splinter"](), attn_implementation="eager"
    )
    with pytest.raises(ValueError, match=r'attn_implementation="torch_ext": .* does not support'):
        model.set_attn_implementation("torch_ext")
    assert model.config._attn_implementation == "eager"


def test_refused_inside_a_model_that_supports_it():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=WITHOUT_SDPA["xglm"](), image_token_index=5
    )
    for implementation in ("torch_ext", {"text_config": "torch_ext"}):
        with pytest.raises(ValueError, match='"torch_ext": XGLMModel does not support'):
            transformers.LlavaForConditionalGeneration._from_config(
                copy.deepcopy(config), attn_implementation=implementation
            )
    model = transformers.LlavaForConditionalGeneration._from_config(
        config, attn_implementation={"vision_config": "torch_ext", "text_config": "eager"}
    )
    assert model.config.vision_config._attn_implementation == "torch_ext"
    assert model.config.text_config._attn_implementation == "eager"


def test_set_after_construction_gives_the_same_logits():
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    model = decoder("mistral", "eager")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("torch_ext")
        found = model(**inputs).logits
    assert torch_ext.last_attention_path().startswith("cpu.")
    seen = padding("left").bool()
    assert_same_but_for_rounding(found[seen], expected[seen])


class Layer(torch.nn.Module):
    """An attention layer that does not say whether it is causal."""

    num_key_value_groups = 1

    def __init__(self, config=None):
        super().__init__()
        self.config = config


class CrossAttention(Layer):
    pass


LLAMA, BERT = transformers.LlamaConfig(), transformers.BertConfig()


@pytest.mark.parametrize(
    ("layer", "kv_len", "causal"),
    [
        (Layer(), 6, True),
        (Layer(LLAMA), 6, True),
        (Layer(BERT), 6, False),
        (Layer(transformers.BertConfig(is_decoder=True)), 6, True),
        (Layer(LLAMA), 9, False),
        (CrossAttention(LLAMA), 6, False),
    ],
)
def test_layers_that_do_not_say_are_causal_in_decoders_alone(layer, kv_len, causal):
    query, key, value = (torch.randn(2, 4, n, 8) for n in (6, kv_len, kv_len))
    out, _ = torch_ext_hf.attention_forward(layer, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal
    ).transpose(1, 2)
    assert_same_but_for_rounding(out, expected)


def test_cross_attention_of_mllama_sees_every_key():
    """Its layer has no is_causal, and no mask comes with it; as many queries as keys."""
    from transformers.models.mllama import modeling_mllama

    config = transformers.models.mllama.MllamaTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, cross_attention_layers=[0],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = {}
    for implementation in ("torch_ext", "eager"):
        torch.manual_seed(0)
        config._attn_implementation = implementation
        layer = modeling_mllama.MllamaTextCrossAttention(config, layer_idx=0)
        generator = torch.Generator().manual_seed(1)
        hidden, states = (torch.randn(2, 6, 32, generator=generator) for _ in range(2))
        found[implementation] = layer(hidden, cross_attention_states=states)[0]
    assert_same_but_for_rounding(found["torch_ext"], found["eager"])


def test_attention_weights_are_missed_aloud_as_by_sdpa():
    model = decoder("llama", "torch_ext")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = transformers.utils.logging.get_logger("transformers.integrations.torch_ext")
        said: list[str] = []
        logger.warning, original = lambda text, *_: said.append(text), logger.warning
        logger.warning_once.cache_clear()
        try:
            assert not model(tokens(), output_attentions=True).attentions
        finally:
            logger.warning = original
    assert said
    assert "`torch_ext` attention does not support `output_attentions=True`" in said[0]


def test_a_causal_mask_of_a_bidirectional_configuration_is_there():
    """PaliGemma's layers take no mask for no masking; eager has the causal one (sdpa has not)."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = transformers.GemmaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=1, head_dim=8, **sizes
    )
    vision = transformers.SiglipVisionConfig(
        num_attention_heads=4, image_size=16, patch_size=8, **sizes
    )
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_index=96
    )
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation="torch_ext"
    ).eval()
    assert not model.model.language_model.layers[0].self_attn.is_causal
    ids = tokens(batch=1)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 90
    with torch.no_grad():
        assert_same_but_for_rounding(model(changed).logits[:, :-1], model(ids).logits[:, :-1])
