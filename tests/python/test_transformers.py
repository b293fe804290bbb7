"""Hugging Face models on attn_implementation="torch_ext": the stock models' numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from rounding_bounds import assert_no_further, assert_same_but_for_rounding, in_float64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import DECODERS, VOCABULARY, cached, decoder, padding, tokens

import torch_ext
from torch_ext.integrations import transformers as torch_ext_hf

torch_ext_hf.register()

STOCK = ("sdpa", "eager")


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


def ran_fused() -> bool:
    return torch_ext.last_attention_path().startswith("cpu.")


def logits_and_gradients(
    model: torch.nn.Module,
    labelled: Tensor | None = None,
    *,
    exact: bool = False,
    **inputs: Tensor,
) -> dict[str, Tensor]:
    """The labelled positions' logits, and the parameters' gradients of their cross entropy.

    exact: in float64.
    """
    model.zero_grad(set_to_none=True)
    with in_float64() if exact else contextlib.nullcontext():
        logits = model(**inputs, use_cache=False).logits
    labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % VOCABULARY
    if labelled is not None:
        logits, labels = logits[labelled], labels[labelled]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    loss.backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_decoders_give_stock_logits_and_gradients(name, side):
    inputs = {"input_ids": tokens()}
    labelled = None
    if side is not None:
        inputs["attention_mask"] = padding(side)
        labelled = inputs["attention_mask"].bool()
    ours = logits_and_gradients(decoder(name, "torch_ext"), labelled, **inputs)
    assert ran_fused()
    with torch_ext.enabled():
        dropped_in = logits_and_gradients(decoder(name, "sdpa"), labelled, **inputs)
        assert ran_fused()
    exact = logits_and_gradients(decoder(name, "eager"), labelled, exact=True, **inputs)
    for stock in STOCK:
        expected = logits_and_gradients(decoder(name, stock), labelled, **inputs)
        assert_no_further(ours, expected, exact)
        assert_no_further(dropped_in, expected, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    labelled = padding("left").bool()
    found = {
        name: logits_and_gradients(decoder("llama", name).to(dtype), labelled, **inputs)
        for name in ("torch_ext", "sdpa")
    }
    exact = logits_and_gradients(
        decoder("llama", "eager").to(dtype), labelled, exact=True, **inputs
    )
    assert_no_further(found["torch_ext"], found["sdpa"], exact)


def assert_as_stock(ours: dict[str, Tensor], **inputs: Tensor) -> None:
    model = decoder("llama", "sdpa")
    stock = logits_and_gradients(model, **inputs)
    assert_no_further(ours, stock, logits_and_gradients(model, exact=True, **inputs))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_four_dimensional_masks(kind):
    ids = tokens(batch=2, length=8)
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    allowed = allowed & ~torch.eye(8, dtype=torch.bool).roll(-3, 1)
    allowed = allowed.expand(2, 1, 8, 8)
    mask = allowed
    if kind == "additive":
        mask = torch.zeros(2, 1, 8, 8).masked_fill(~allowed, torch.finfo(torch.float32).min)
    inputs = {"input_ids": ids, "attention_mask": mask}
    ours = logits_and_gradients(decoder("llama", "torch_ext"), **inputs)
    assert ran_fused()
    assert_as_stock(ours, **inputs)


def test_packed_sequences():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])
    inputs = {"input_ids": tokens(batch=1), "position_ids": positions}
    ours = logits_and_gradients(decoder("llama", "torch_ext"), **inputs)
    assert_as_stock(ours, **inputs)


def test_key_and_value_heads_are_not_repeated():
    heads: list[tuple[int, int]] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention_forward" in func.name():
                heads.append((args[0].shape[1], args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    with Operators():
        decoder("llama", "torch_ext")(input_ids=tokens(), attention_mask=padding("left"))
    assert heads == [(4, 2)] * 2


def test_attention_dropout_in_training():
    ids = tokens(batch=1, length=8).repeat(200, 1)  # each sequence drops weights of its own
    models = {
        name: decoder("llama", name, attention_dropout=0.3).train()
        for name in ("torch_ext", "eager")
    }
    with torch.no_grad():
        model = models["torch_ext"]
        torch.manual_seed(3)
        first = model(ids).logits
        torch.manual_seed(3)
        assert torch.equal(first, model(ids).logits)
        assert not torch.equal(first, model(ids).logits)
        samples = {name: model(ids).logits for name, model in models.items()}
    spread = samples["eager"].std(0)
    error = (samples["torch_ext"].mean(0) - samples["eager"].mean(0)).abs()
    assert (error < 6 * spread * (2 / 200) ** 0.5 + 1e-4).all()
    torch.testing.assert_close(samples["torch_ext"].std(0).mean(), spread.mean(), rtol=0.1, atol=0)


def test_gradient_checkpointing_with_dropout():
    ids = tokens(batch=2)
    found = []
    for checkpointed in (False, True):
        model = decoder("llama", "torch_ext", attention_dropout=0.3).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        found.append(logits_and_gradients(model, input_ids=ids))
    for name, expected in found[0].items():
        assert_same_but_for_rounding(found[1][name], expected)


def encoder(kind: str, implementation: str) -> torch.nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=VOCABULARY, **sizes)
        return transformers.AutoModel.from_config(config, attn_implementation=implementation)
    config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
    return transformers.AutoModel.from_config(config, attn_implementation=implementation)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(kind):
    if kind == "bert":
        inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
        seen = padding("right").bool()
    else:
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
        seen = torch.ones(2, 17, dtype=torch.bool)
    # The squares of a LayerNorm's outputs have one sum, and gradients that are rounding alone.
    direction = torch.randn(int(seen.sum()), 32)

    def hidden_and_gradients(implementation: str, exact: bool = False) -> dict[str, Tensor]:
        model = encoder(kind, implementation)
        with in_float64() if exact else contextlib.nullcontext():
            hidden = model(**inputs).last_hidden_state[seen]
        (hidden * direction).sum().backward()
        return {"hidden": hidden.detach()} | {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    ours = hidden_and_gradients("torch_ext")
    assert ran_fused()
    exact = hidden_and_gradients("eager", exact=True)
    for stock in STOCK:
        assert_no_further(ours, hidden_and_gradients(stock), exact)


def encoder_decoder(kind: str, implementation: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration._from_config(
            config, attn_implementation=implementation
        )
        inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
    else:
        config = transformers.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_source_positions=16, max_target_positions=32, dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        model = transformers.WhisperForConditionalGeneration._from_config(
            config, attn_implementation=implementation
        )
        features = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))
        inputs = {"input_features": features}
    return model, inputs | {"decoder_input_ids": tokens(length=7)}


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_encoder_decoders(kind):
    found = {}
    for implementation in ("torch_ext", *STOCK):
        model, inputs = encoder_decoder(kind, implementation)
        found[implementation] = logits_and_gradients(model, **inputs)
        assert ran_fused() or implementation != "torch_ext"
    exact = logits_and_gradients(model, exact=True, **inputs)  # eager's
    for stock in STOCK:
        assert_no_further(found["torch_ext"], found[stock], exact)


@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
def test_soft_capping(softcap):
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "sliding_window": 5, "pad_token_id": 0,
    }  # fmt: skip
    found = {}
    labelled = padding("left").bool()
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    for implementation in ("torch_ext", "eager"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**sizes, attn_logit_softcapping=softcap),
            attn_implementation=implementation,
        )
        found[implementation] = logits_and_gradients(model, labelled, **inputs)
        assert ran_fused() or implementation != "torch_ext"
    exact = logits_and_gradients(model, labelled, exact=True, **inputs)  # eager's
    assert_no_further(found["torch_ext"], found["eager"], exact)


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_gemma_4_drops_queries_whose_logits_nobody_wants(kept, static):
    logits = {}
    for implementation in ("torch_ext", "sdpa"):
        torch.manual_seed(0)
        config = transformers.Gemma4TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16,
            num_global_key_value_heads=2, sliding_window=5, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY, pad_token_id=0,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        ).eval()
        options = {}
        if static:
            options = cached(model, transformers.StaticCache(config=config, max_cache_len=16))
        with torch.no_grad():
            logits[implementation] = model(tokens(), logits_to_keep=kept, **options).logits
    assert_same_but_for_rounding(logits["torch_ext"], logits["sdpa"])
