"""Attention sinks on attn_implementation="torch_ext": eager's numbers, which "sdpa" cannot give."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from rounding_bounds import assert_no_further, assert_same_but_for_rounding
from transformers import StaticCache
from transformers_models import VOCABULARY, cached, padding, tokens

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()


class Layer(torch.nn.Module):
    is_causal = True


def written_out(query, key, value, mask, sinks):
    """The sink is one more column of scores; its weight goes nowhere."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    column = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    column = column.expand(*scores.shape[:-1], 1)
    return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def operands(dtype, per_token: bool):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 16, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 16, generator=generator, dtype=torch.float64)
    sinks = torch.randn((2, 4, 9, 1) if per_token else (4,), generator=generator).double()
    return [t.to(dtype).requires_grad_() for t in (query, key, value, sinks)]


def named(out, inputs, dtype=None):
    """The output and the gradients of a weighted sum of it, its weights rounded to dtype."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype or out.dtype).view(out.shape)
    gradients = torch.autograd.grad(out, inputs, weights.to(out.dtype))
    names = ("query", "key", "value", "sinks")
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sinks_take_their_share_of_the_weights(masked, per_token):
    inputs = operands(torch.float64, per_token)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    if masked:
        mask = mask & (torch.arange(9) > 2)  # the first three queries attend to nothing
    name = "sinks" if per_token else "s_aux"
    out, weights = torch_ext_hf.attention_forward(
        Layer(), *inputs[:3], mask if masked else None, **{name: inputs[3]}
    )
    assert weights is None
    assert torch_ext.last_attention_path().startswith("cpu.")
    assert out.is_contiguous()
    expected = written_out(*inputs[:3], mask, inputs[3])
    if masked:
        assert torch.equal(out[:, :3], torch.zeros_like(out[:, :3]))
    assert_same_but_for_rounding(
        list(named(out, inputs).values()), list(named(expected, inputs).values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_eager(dtype):
    inputs = operands(dtype, False)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = written_out(*exact_inputs[:3], mask, exact_inputs[3])
    eager = written_out(*inputs[:3], mask, inputs[3])
    out, _ = torch_ext_hf.attention_forward(Layer(), *inputs[:3], None, s_aux=inputs[3])
    assert out.dtype == dtype
    assert_no_further(
        named(out, inputs), named(eager, inputs), named(exact, exact_inputs, out.dtype)
    )


def test_dropout_drops_weights_after_the_softmax_as_eager_does():
    query, key, value, sinks = operands(torch.float32, False)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack(
            [
                torch_ext_hf.attention_forward(
                    Layer(), query, key, value, None, dropout=0.4, s_aux=sinks
                )[0]
                for _ in range(400)
            ]
        )
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        expected = written_out(query, key, value, mask, sinks)
    error = (samples.mean(0) - expected).abs()
    assert (error <= 6 * samples.std(0) / math.sqrt(400) + 1e-6).all()


def gpt_oss(implementation: str):
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=5, pad_token_id=0, eos_token_id=None,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            if name.endswith("sinks"):
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_gpt_oss_generates_what_eager_generates(cache):
    found = {}
    for implementation in ("torch_ext", "eager"):
        options = {"cache_implementation": "static"} if cache == "static" else {}
        found[implementation] = gpt_oss(implementation).generate(
            tokens(), attention_mask=padding("left"), do_sample=False, max_new_tokens=8,
            min_new_tokens=8, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    assert torch.equal(found["torch_ext"].sequences, found["eager"].sequences)
    assert_same_but_for_rounding(found["torch_ext"].logits, found["eager"].logits)


def test_gpt_oss_in_bfloat16_is_no_further_off_than_eager():
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    seen = padding("left").bool()
    with torch.no_grad():
        exact = gpt_oss("eager")(**inputs).logits[seen]
        eager, ours = (
            gpt_oss(name).to(torch.bfloat16)(**inputs).logits[seen].float()
            for name in ("eager", "torch_ext")
        )
    assert (ours - exact).norm() < 1.5 * (eager - exact).norm()


def test_compiled_with_a_static_cache(fresh_dynamo):
    model, stock = gpt_oss("torch_ext"), gpt_oss("eager")
    caches = [StaticCache(config=m.config, max_cache_len=32) for m in (model, stock)]
    compiled = torch.compile(model.forward, backend="aot_eager")
    ids = tokens()
    with torch.no_grad():
        logits = [
            m(ids, **cached(m, c)).logits for m, c in zip((model, stock), caches, strict=True)
        ]
        token = logits[1][:, -1:].argmax(-1)
        positions = torch.full((3, 1), ids.shape[1])
        found = compiled(token, **cached(model, caches[0]), position_ids=positions).logits
        expected = stock(token, **cached(stock, caches[1]), position_ids=positions).logits
    assert_same_but_for_rounding(found, expected)
