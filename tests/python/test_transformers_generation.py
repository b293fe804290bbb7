"""Generation on attn_implementation="torch_ext": caches, padding, sampling, compiled decoding."""

from __future__ import annotations

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding
from transformers import StaticCache
from transformers_models import DECODERS, cached, decoder, padding, tokens

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


def generate(model, **options):
    torch.manual_seed(11)
    return model.generate(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def assert_same_generation(ours, stock) -> None:
    assert torch.equal(ours.sequences, stock.sequences)
    assert_same_but_for_rounding(ours.logits, stock.logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_greedy(name, cache, side):
    options = {"inputs": tokens(), "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    if side is not None:
        options["attention_mask"] = padding(side)
    ours = generate(decoder(name, "torch_ext"), **options)
    assert torch_ext.last_attention_path().startswith("cpu.")
    assert_same_generation(ours, generate(decoder(name, "sdpa"), **options))
    with torch_ext.enabled():
        assert_same_generation(generate(decoder(name, "sdpa"), **options), ours)


def test_sampling_draws_the_same_tokens():
    options = {"inputs": tokens(), "attention_mask": padding("left"), "do_sample": True}
    ours = generate(decoder("llama", "torch_ext"), **options, top_k=20)
    assert_same_generation(ours, generate(decoder("llama", "sdpa"), **options, top_k=20))


def test_beams():
    options = {"inputs": tokens(), "attention_mask": padding("left"), "num_beams": 3}
    ours = generate(decoder("qwen2", "torch_ext"), **options)
    assert torch.equal(ours.sequences, generate(decoder("qwen2", "sdpa"), **options).sequences)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_prompt_in_pieces(name):
    """A cache that is neither empty nor at its last token: queries in the middle of the keys."""
    ids = tokens()
    results = {}
    for implementation in ("torch_ext", "sdpa"):
        model = decoder(name, implementation)
        with torch.no_grad():
            whole = model(ids).logits
            first = model(ids[:, :5], use_cache=True)
            second = model(ids[:, 5:], **cached(model, first.past_key_values)).logits
        assert_same_but_for_rounding(second, whole[:, 5:])
        results[implementation] = second
    assert_same_but_for_rounding(results["torch_ext"], results["sdpa"])


def test_first_tokens_in_an_empty_static_cache():
    """key is longer than query there, and causal from the top left."""
    ids = tokens()
    found = {}
    for implementation in ("torch_ext", "sdpa"):
        model = decoder("llama", implementation)
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            found[implementation] = model(ids, **cached(model, cache)).logits
            plain = model(ids, use_cache=False).logits
        assert_same_but_for_rounding(found[implementation], plain)
    assert_same_but_for_rounding(found["torch_ext"], found["sdpa"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decoding_with_a_static_cache(backend, fresh_dynamo):
    """One graph for every position; prompts of two lengths."""
    model = decoder("llama", "torch_ext")
    stock = decoder("llama", "sdpa")
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    graphs = []
    for length in (6, 9):
        caches = [StaticCache(config=m.config, max_cache_len=32) for m in (model, stock)]
        ids = tokens(length=length)
        with torch.no_grad():
            logits = [
                m(ids, **cached(m, c)).logits for m, c in zip((model, stock), caches, strict=True)
            ]
            for step in range(4):
                assert_same_but_for_rounding(*logits)
                token = logits[1][:, -1:].argmax(-1)
                positions = torch.tensor([[length + step]]).expand(3, 1)
                options = {"position_ids": positions}
                logits = [
                    compiled(token, **cached(model, caches[0]), **options).logits,
                    stock(token, **cached(stock, caches[1]), **options).logits,
                ]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch_ext.last_attention_path().startswith("cpu.")
    assert graphs[0] == graphs[1]


def test_compiled_training_takes_changing_lengths(fresh_dynamo):
    model = decoder("llama", "torch_ext").train()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for length in (7, 11, 16):
        ids = tokens(length=length)
        loss = compiled(ids, labels=ids, use_cache=False).loss
        (grad,) = torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)
        expected = model(ids, labels=ids, use_cache=False).loss
        (stock,) = torch.autograd.grad(expected, model.model.layers[0].self_attn.k_proj.weight)
        assert_same_but_for_rounding([loss, grad], [expected, stock])
