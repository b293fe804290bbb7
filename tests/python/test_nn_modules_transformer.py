"""nn.TransformerEncoder, nn.TransformerDecoder and nn.Transformer with the drop-in on, as stock."""

from __future__ import annotations

import warnings

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding
from stock_comparison import compare_with_stock, ran_fused
from torch import Tensor, nn

import torch_ext

BATCH, SOURCE, TARGET, EMBED, HEADS = 3, 10, 7, 32, 4


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


# Smooth: rounding switches a ReLU near 0 on or off, and with it a row of a gradient.
SMOOTH = {"dim_feedforward": 64, "dropout": 0.0, "activation": "gelu"}


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(3)
    options = SMOOTH | {"batch_first": True} | options
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **options)
    nn.init.normal_(layer.self_attn.in_proj_bias, std=0.3)
    return layer


def padding_mask(length: int = SOURCE) -> Tensor:
    return torch.arange(length) >= torch.tensor([[length], [4], [6]])


def causal_mask(length: int = SOURCE) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


MASKS = {
    "none": {},
    "causal": {"src_mask": causal_mask()},
    "causal hint": {"src_mask": causal_mask(), "is_causal": True},
    "boolean": {"src_mask": torch.ones(SOURCE, SOURCE, dtype=torch.bool).triu(2)},
    "padding": {"src_key_padding_mask": padding_mask()},
    "both": {
        "src_mask": torch.ones(SOURCE, SOURCE, dtype=torch.bool).triu(1),
        "src_key_padding_mask": padding_mask(),
    },
    "per head": {
        "src_mask": (torch.arange(BATCH * HEADS * SOURCE * SOURCE) % 3 == 1).view(
            BATCH * HEADS, SOURCE, SOURCE
        )
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("mode", ["train", "eval", "fast path"])
def test_encoder_layer(masks, mode):
    layer = encoder_layer().train(mode == "train")
    x = torch.randn(BATCH, SOURCE, EMBED)

    def call():
        with torch.set_grad_enabled(mode != "fast path"):
            return layer(x, **MASKS[masks])

    compare_with_stock(layer, call)


@pytest.mark.parametrize("mode", ["train", "fast path"])
@pytest.mark.parametrize(
    "options",
    [
        {"norm_first": True},
        {"batch_first": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
    ids=["norm first", "sequence first", "bfloat16", "float64"],
)
def test_encoder_layer_options(options, mode):
    layer = encoder_layer(**options).train(mode == "train")
    x = torch.randn(BATCH, SOURCE, EMBED, dtype=options.get("dtype", torch.float32))
    masks = {"src_key_padding_mask": padding_mask()}
    if not options.get("batch_first", True):
        x = x.transpose(0, 1).contiguous()

    def call():
        with torch.set_grad_enabled(mode == "train"):
            return layer(x, **masks)

    compare_with_stock(layer, call)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_inference_with_and_without_nested_tensors(guard, nested, dtype):
    encoder = nn.TransformerEncoder(encoder_layer(dtype=dtype), 2, enable_nested_tensor=nested)
    encoder.eval()
    x = torch.randn(BATCH, SOURCE, EMBED, dtype=dtype)

    def call():
        with guard(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
            # Rows behind a sequence's end: 0 from nested tensors, arbitrary without them.
            out = encoder(x, src_key_padding_mask=padding_mask())
            return out.masked_fill(padding_mask().unsqueeze(-1), 0.0)

    compare_with_stock(encoder, call)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_default_activation(guard):
    """ReLU, forward only."""
    layer = encoder_layer(activation="relu").eval()
    x = torch.randn(BATCH, SOURCE, EMBED)

    def call():
        with guard():
            return layer(x, src_key_padding_mask=padding_mask())

    compare_with_stock(layer, call)


def test_a_nested_tensor_from_the_user():
    layer = encoder_layer().eval()
    sequences = [torch.randn(length, EMBED) for length in (SOURCE, 4, 1)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(sequences)
        stock = layer(nested)
        with torch_ext.enabled():
            ours = layer(nested)
            assert ran_fused()
            alone = [layer(sequence.unsqueeze(0)).squeeze(0) for sequence in sequences]
    for result, expected, single in zip(ours.unbind(), stock.unbind(), alone, strict=True):
        assert_same_but_for_rounding(result, expected)
        assert_same_but_for_rounding(result, single)


@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_encoder(masks, training):
    encoder = nn.TransformerEncoder(
        encoder_layer(norm_first=True), 2, norm=nn.LayerNorm(EMBED), enable_nested_tensor=False
    ).train(training)
    x = torch.randn(BATCH, SOURCE, EMBED, requires_grad=True)
    arguments = {{"src_mask": "mask"}.get(k, k): v for k, v in MASKS[masks].items()}
    compare_with_stock(encoder, lambda: encoder(x, **arguments), (x,))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder(training, batch_first, norm_first):
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(
        EMBED, HEADS, **SMOOTH, batch_first=batch_first, norm_first=norm_first
    )
    decoder = nn.TransformerDecoder(layer, 2).train(training)
    target, memory = torch.randn(BATCH, TARGET, EMBED), torch.randn(BATCH, SOURCE, EMBED)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    for options in (
        {"tgt_mask": causal_mask(TARGET), "tgt_is_causal": True},
        {
            "tgt_mask": causal_mask(TARGET).isinf(),
            "tgt_key_padding_mask": padding_mask(TARGET),
            "memory_key_padding_mask": padding_mask(),
        },
    ):
        compare_with_stock(decoder, lambda options=options: decoder(target, memory, **options))


@pytest.mark.parametrize("training", [True, False])
def test_transformer(training):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(EMBED, HEADS, 1, 1, **SMOOTH, batch_first=True)
    model.train(training)
    source, target = torch.randn(BATCH, SOURCE, EMBED), torch.randn(BATCH, TARGET, EMBED)

    def call():
        with torch.set_grad_enabled(training):
            return model(
                source,
                target,
                tgt_mask=causal_mask(TARGET),
                src_key_padding_mask=padding_mask(),
                memory_key_padding_mask=padding_mask(),
                tgt_is_causal=True,
            )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        warnings.filterwarnings("ignore", message=".*mismatched.*")
        compare_with_stock(model, call)


def test_training_with_dropout_learns_as_stock():
    """Two runs from one seed drop different weights, yet learn the same thing."""
    torch.manual_seed(0)
    data = torch.randn(64, SOURCE, EMBED)
    labels = (data[:, 0].sum(-1) > 0).long()

    def train(on: bool) -> float:
        layer = encoder_layer()
        layer.self_attn.dropout = 0.1
        head = nn.Linear(EMBED, 2)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
        torch.manual_seed(1)
        with torch_ext.enabled(on):
            for _ in range(60):
                loss = nn.functional.cross_entropy(head(layer(data)[:, 0]), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return loss.item()

    assert train(False) < 0.2
    assert train(True) < 0.2
