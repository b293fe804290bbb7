"""Families whose modeling files name "eager" and "sdpa": "torch_ext" does there as "sdpa" does."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io

import pytest
import torch
import transformers
from rounding_bounds import assert_no_further, in_float64
from transformers_models import VOCABULARY, padding, tokens

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
_INDEXED = {
    **_SIZES, "intermediate_size": 64, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
    "first_k_dense_replace": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {
    "falcon": lambda: transformers.FalconConfig(**_SIZES),
    "falcon_alibi": lambda: transformers.FalconConfig(**_SIZES, alibi=True),
    "deepseek_v32": lambda: transformers.AutoConfig.for_model("deepseek_v32", **_INDEXED),
    "glm_moe_dsa": lambda: transformers.AutoConfig.for_model(
        "glm_moe_dsa", **_INDEXED, indexer_types=["full", "shared"]
    ),
}


def model(config, implementation: str):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # torch's grouped_mm knows no float64
    mapping = transformers.AutoModelForCausalLM
    if config.model_type in ("sam_vision_model", "data2vec-vision"):
        mapping = transformers.AutoModel
    made = mapping.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return made.eval()


def out_and_gradients(made, out_of, exact: bool = False):
    made.zero_grad(set_to_none=True)
    with in_float64() if exact else contextlib.nullcontext():
        out = out_of(made)
    out.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | gradients


def assert_as(stocks, config, out_of):
    ours = out_and_gradients(model(config, "torch_ext"), out_of)
    assert torch_ext.last_attention_path().endswith("backward")
    for name in stocks:
        stock = model(config, name)
        exact = out_and_gradients(stock, out_of, exact=True)
        assert_no_further(ours, out_and_gradients(stock, out_of), exact)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_text(name, side):
    config = TEXT[name]()
    inputs = {"input_ids": tokens()}
    seen = torch.ones(3, 12, dtype=torch.bool)
    if side is not None:
        inputs["attention_mask"] = padding(side)
        seen = padding(side).bool()
    # Falcon's eager adds ALiBi twice, to the mask and to the scores.
    stocks = ("sdpa",) if name == "falcon_alibi" else ("eager", "sdpa")
    assert_as(stocks, config, lambda m: m(**inputs, use_cache=False).logits[seen])


@pytest.mark.parametrize("name", TEXT)
def test_text_generates_what_sdpa_generates(name):
    config = TEXT[name]()
    found = [
        model(config, implementation).generate(
            tokens(), attention_mask=padding("left"), do_sample=False, max_new_tokens=6,
            min_new_tokens=6,
        )
        for implementation in ("torch_ext", "sdpa")
    ]  # fmt: skip
    assert torch.equal(*found)


VISION = {
    "sam": lambda: transformers.SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, window_size=2, global_attn_indexes=[1], mlp_dim=64,
        num_pos_feats=8,
    ),
    "data2vec": lambda: transformers.Data2VecVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, use_relative_position_bias=True,
    ),
}  # fmt: skip


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", VISION)
def test_vision(name):
    config = VISION[name]()
    assert_as(("eager", "sdpa"), config, lambda m: m(pixel_values=images()).last_hidden_state)


def test_their_layers_copy_and_pickle():
    ours = model(TEXT["falcon"](), "torch_ext")
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    expected = ours(tokens()).logits
    for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(copied(tokens()).logits, expected)
        assert type(copied.transformer.h[0].self_attention).__name__ == "FalconAttentionOnTorchExt"


def test_their_layers_leave_stock_attention_alone():
    query = torch.randn(1, 2, 4, 8)
    model(TEXT["falcon"](), "torch_ext")(tokens())
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert not torch_ext.is_enabled()
    classes = importlib.import_module(
        "transformers.models.falcon.modeling_falcon"
    ).FALCON_ATTENTION_CLASSES
    assert classes["sdpa"] is classes["eager"]


def test_compiled(fresh_dynamo):
    ours = model(TEXT["falcon"](), "torch_ext")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens(), use_cache=False).logits
        assert torch_ext.last_attention_path().startswith("cpu.")
        torch.testing.assert_close(found, ours(tokens(), use_cache=False).logits)


class Layer(torch.nn.Module):
    is_causal = True


def attend(mask=None, **options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=generator)
    ours, _ = torch_ext_hf.attention_forward(Layer(), query, key, value, mask, **options)
    return ours, lambda mask: (
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    ).transpose(1, 2)


TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_indices_hide_all_other_keys(mask):
    indices = torch.tensor([[[0, 0], [0, 1], [1, 2], [0, 3], [2, 4], [3, 5]]])
    chosen = torch.zeros(1, 1, 6, 6, dtype=torch.bool).scatter(-1, indices[None], True)
    given = {
        None: None,
        "boolean": TRIANGLE,
        "additive": torch.zeros(6, 6).masked_fill(~TRIANGLE, torch.finfo(torch.float32).min),
    }[mask]
    ours, stock = attend(given, indices=indices)
    torch.testing.assert_close(ours, stock(chosen & TRIANGLE))


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_do_not_see_each_other(masked):
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    ours, stock = attend(TRIANGLE if masked else None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    number = torch.tensor([0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(ours, stock((number[:, None] == number) & TRIANGLE))


def test_packed_sequences_that_cannot_be_told_apart_are_refused():
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="takes `cu_seq_lens_q` and `cu_seq_lens_k` that end at"):
        attend(cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_chosen_blocks_without_their_indexer_are_refused():
    with pytest.raises(ValueError, match=r'use attn_implementation="sdpa" with torch_ext.enable'):
        attend(block_indices=torch.zeros(1, 2, 6, 1, dtype=torch.int64))
