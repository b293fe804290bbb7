"""timm's vision transformers with the drop-in on."""

from __future__ import annotations

import pytest
import timm
import torch
from rounding_bounds import assert_no_further, in_float64
from stock_comparison import compare_with_stock

import torch_ext


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


def model(name: str, **options):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=10, img_size=64, **options)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch16_224"],
)
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients(name, training):
    network = model(name, depth=2).train(training)
    images = torch.randn(2, 3, 64, 64)

    def call():
        with torch.set_grad_enabled(training):
            return network(images)

    compare_with_stock(network, call)


def test_windowed_attention_with_a_bias_that_learns():
    """Swin: an additive mask per head, whose gradient is the relative position table's."""
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, num_classes=10, img_size=56,
        window_size=7, depths=(2, 2), num_heads=(3, 6), embed_dim=24,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 56, 56)
    compare_with_stock(network, lambda: network(images))


def test_compiled_and_in_low_precision(fresh_dynamo):
    network = model("vit_tiny_patch16_224", depth=2).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stock = network(images)
        with torch_ext.enabled():
            compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
            ours = compiled(images)
            assert torch_ext.last_attention_path().startswith("cpu.")
        with in_float64():
            exact = network(images)
        assert_no_further({"logits": ours}, {"logits": stock}, {"logits": exact})
        with torch.autocast("cpu", torch.bfloat16):
            stock = network(images)
            with torch_ext.enabled():
                ours = network(images)
        assert_no_further({"logits": ours}, {"logits": stock}, {"logits": exact})
