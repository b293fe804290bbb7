"""nn.MultiheadAttention with the drop-in on: every argument, training and inference, as stock."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from rounding_bounds import assert_same_but_for_rounding
from stock_comparison import compare_with_stock, outputs_and_gradients, ran_fused
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ext

BATCH, LENGTH, EMBED, HEADS = 3, 10, 32, 4


@pytest.fixture(autouse=True)
def _off_afterwards():
    yield
    torch_ext.disable()


class CalledOperators(TorchDispatchMode):
    """The names of the operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def whole_layers(self) -> int:
        # The inference fast path's operator runs in the override, out of the mode's sight.
        whole = ("packed_attention_forward", "_native_multi_head_attention")
        return sum(any(part in name for part in whole) for name in self.names)


def whole_layer_runs(call) -> bool:
    """Whether self_attention, not only the attention inside, runs under the drop-in."""
    with torch_ext.enabled(), CalledOperators() as operators:
        call()
    return operators.whole_layers > 0


def make(embed: int = EMBED, heads: int = HEADS, **options) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(embed, heads, **options)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)  # zeros would hide a bias that is left out
    return layer


def causal_mask(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding_mask() -> Tensor:
    lengths = torch.tensor([[LENGTH], [4], [7]])
    return torch.arange(LENGTH) >= lengths


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


MASKS = {
    "none": {},
    "causal": {"attn_mask": causal_mask()},
    "causal hint": {"attn_mask": causal_mask(), "is_causal": True},
    "additive hint": {"attn_mask": additive(causal_mask()), "is_causal": True},
    "per head": {"attn_mask": (torch.arange(BATCH * HEADS * LENGTH * LENGTH) % 3 == 1).view(
        BATCH * HEADS, LENGTH, LENGTH)},
    "additive": {"attn_mask": torch.linspace(-2, 2, LENGTH * LENGTH).view(LENGTH, LENGTH)},
    "padding": {"key_padding_mask": padding_mask()},
    "additive padding": {"key_padding_mask": additive(padding_mask())},
    "biased padding": {"key_padding_mask": torch.linspace(-1, 1, BATCH * LENGTH).view(BATCH, -1)},
    "both": {"attn_mask": causal_mask(), "key_padding_mask": padding_mask()},
    "both, hint": {
        "attn_mask": causal_mask(), "key_padding_mask": padding_mask(), "is_causal": True},
    "both additive": {
        "attn_mask": torch.linspace(-2, 2, LENGTH * LENGTH).view(LENGTH, LENGTH),
        "key_padding_mask": additive(padding_mask())},
    "both additive, hint": {
        "attn_mask": additive(causal_mask()),
        "key_padding_mask": torch.linspace(-1, 1, BATCH * LENGTH).view(BATCH, -1),
        "is_causal": True},
}  # fmt: skip


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_as_stock(masks, training, batch_first):
    layer = make(batch_first=batch_first).train(training)
    x = torch.randn(BATCH, LENGTH, EMBED) if batch_first else torch.randn(LENGTH, BATCH, EMBED)
    x.requires_grad_(training)

    def call():
        with torch.set_grad_enabled(training):
            return layer(x, x, x, need_weights=False, **MASKS[masks])

    compare_with_stock(layer, call, (x,))
    # Sequence first keeps torch's path in training, with fused attention inside.
    assert whole_layer_runs(call) is batch_first


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masks", ["none", "both"])
def test_weights_are_still_given_where_asked_for(training, average, masks):
    layer = make(batch_first=True).train(training)
    x = torch.randn(BATCH, LENGTH, EMBED)

    def call():
        with torch.set_grad_enabled(training):
            return layer(x, x, x, average_attn_weights=average, **MASKS[masks])

    compare_with_stock(layer, call, fused=False)
    with torch_ext.enabled():
        _, weights = call()
    heads = () if average else (HEADS,)
    assert weights.shape == (BATCH, *heads, LENGTH, LENGTH)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_as_stock(batch_first, need_weights):
    layer = make(batch_first=batch_first, kdim=16, vdim=24)
    query, key, value = torch.randn(BATCH, 5, EMBED), torch.randn(BATCH, 7, 16), None
    value = torch.randn(BATCH, 7, 24)
    inputs = [t if batch_first else t.transpose(0, 1).contiguous() for t in (query, key, value)]
    for tensor in inputs:
        tensor.requires_grad_()
    padding = torch.arange(7) >= torch.tensor([[7], [3], [5]])
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.rand(5, 7)}):
        compare_with_stock(
            layer,
            lambda options=options: layer(*inputs, need_weights=need_weights, **options),
            tuple(inputs),
            fused=not need_weights,
        )
    same = make(batch_first=batch_first)
    memory = torch.randn_like(inputs[0])
    compare_with_stock(same, lambda: same(inputs[0], memory, memory, need_weights=False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("add_bias_kv", [True, False])
@pytest.mark.parametrize("add_zero_attn", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_constructor_options_as_stock(bias, add_bias_kv, add_zero_attn, training):
    layer = make(
        batch_first=True, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn
    ).train(training)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)
    for options in ({}, MASKS["both"]):

        def call(options=options):
            return layer(x, x, x, need_weights=False, **options)

        compare_with_stock(layer, call, (x,))
        assert whole_layer_runs(call) is not (add_bias_kv or add_zero_attn)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_unbatched_as_stock(batch_first, training):
    layer = make(batch_first=batch_first).train(training)
    x = torch.randn(LENGTH, EMBED, requires_grad=True)
    for options in (
        {},
        {"attn_mask": causal_mask(), "key_padding_mask": padding_mask()[1]},
        {"attn_mask": MASKS["per head"]["attn_mask"][:HEADS]},
        {"key_padding_mask": torch.linspace(-1, 1, LENGTH)},
    ):
        compare_with_stock(
            layer, lambda options=options: layer(x, x, x, need_weights=False, **options), (x,)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_dtypes_as_stock(dtype, training):
    layer = make(batch_first=True, dtype=dtype).train(training)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=dtype)
    for masks in ("none", "both"):

        def call(masks=masks):
            with torch.set_grad_enabled(training):
                return layer(x, x, x, need_weights=False, **MASKS[masks])

        compare_with_stock(layer, call)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_as_stock(training):
    layer = make(batch_first=True).train(training)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, x, x, need_weights=False, key_padding_mask=padding_mask())[0]

    compare_with_stock(layer, call, (x,))
    with torch_ext.enabled():
        assert call().dtype == torch.bfloat16


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("heads", [4, 1])  # an odd number keeps torch from its fast path
def test_inference_as_stock(guard, heads):
    layer = make(heads=heads, batch_first=True).eval()
    with guard():
        x = torch.randn(BATCH, LENGTH, EMBED)
        for masks in ("none", "causal", "padding", "both"):

            def call(masks=masks):
                return layer(x, x, x, need_weights=False, **MASKS[masks])

            compare_with_stock(layer, call)


def test_dropout_is_torchs_dropout_of_weights():
    layer = make(batch_first=True, dropout=0.25)
    x = torch.randn(2, 16, EMBED)
    with torch_ext.enabled(), torch.no_grad():
        torch.manual_seed(5)
        first = layer(x, x, x, need_weights=False)[0]
        torch.manual_seed(5)
        assert torch.equal(first, layer(x, x, x, need_weights=False)[0])
        assert not torch.equal(first, layer(x, x, x, need_weights=False)[0])
        samples = torch.stack([layer(x, x, x, need_weights=False)[0] for _ in range(400)])
        layer.eval()
        expected = layer(x, x, x, need_weights=False)[0]
    deviation = samples.std(0)
    assert deviation.max() > 0.01
    error = (samples.mean(0) - expected).abs()
    assert (error < 6 * deviation / 400**0.5 + 1e-4).all()
    layer.train()
    stock = torch.stack([layer(x, x, x, need_weights=False)[0].detach() for _ in range(400)])
    torch.testing.assert_close(deviation.mean(), stock.std(0).mean(), rtol=0.1, atol=0.0)


def test_hooks_subclasses_copies_and_state_dicts_are_untouched():
    class Logged(nn.MultiheadAttention):
        calls = 0

        def forward(self, *arguments, **options):
            Logged.calls += 1
            return super().forward(*arguments, **options)

    torch.manual_seed(3)
    layer = Logged(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    fired: list[str] = []
    layer.register_forward_pre_hook(lambda *_: fired.append("before"))
    layer.register_forward_hook(lambda *_: fired.append("after"))

    def call():
        return layer(x, x, x, need_weights=False)[0]

    keys = list(layer.state_dict())
    stock = call()
    with torch_ext.enabled():
        ours = call()
        assert ran_fused()
        assert list(layer.state_dict()) == keys
        duplicate = copy.deepcopy(make(batch_first=True))
        pickled = pickle.loads(pickle.dumps(make(batch_first=True)))
        torch.testing.assert_close(
            duplicate(x, x, x, need_weights=False)[0], pickled(x, x, x, need_weights=False)[0]
        )
    assert_same_but_for_rounding(ours, stock)
    assert fired == ["before", "after"] * 2
    assert Logged.calls == 2
    assert "forward" not in layer.__dict__


def test_a_forward_of_somebody_elses_stays(monkeypatch):
    stock = nn.MultiheadAttention.forward
    x = torch.randn(BATCH, LENGTH, EMBED)
    layer = make(batch_first=True)

    def theirs(self, *arguments, **options):
        return stock(self, *arguments, **options)

    monkeypatch.setattr(nn.MultiheadAttention, "forward", theirs)
    with torch_ext.enabled():
        assert nn.MultiheadAttention.forward is theirs
        layer(x, x, x, need_weights=False)
        assert ran_fused()  # its attention
    monkeypatch.undo()

    with torch_ext.enabled():
        routed = nn.MultiheadAttention.forward

        def around(self, *arguments, **options):
            return routed(self, *arguments, **options)

        monkeypatch.setattr(nn.MultiheadAttention, "forward", around)
        assert whole_layer_runs(lambda: layer(x, x, x, need_weights=False))
    assert nn.MultiheadAttention.forward is around
    out = layer(x, x, x, need_weights=False)[0]
    monkeypatch.setattr(nn.MultiheadAttention, "forward", stock)
    assert torch.equal(out, layer(x, x, x, need_weights=False)[0])


def test_sdpa_kernel_keeps_torchs_backend():
    layer = make(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    with sdpa_kernel(SDPBackend.MATH):
        expected = layer(x, x, x, need_weights=False)[0]
        with torch_ext.enabled():
            assert torch.equal(layer(x, x, x, need_weights=False)[0], expected)
            assert not ran_fused()
            layer.eval()
            with torch.no_grad():
                layer(x, x, x, need_weights=False)
            assert not ran_fused()


def test_wrong_arguments_fail_as_stock():
    layer = make(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    wrong = (
        {"attn_mask": torch.zeros(LENGTH, LENGTH + 1)},
        {"attn_mask": torch.zeros(LENGTH)},
        {"attn_mask": torch.zeros(2, LENGTH, LENGTH)},
        {"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(BATCH, LENGTH + 1, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(LENGTH, dtype=torch.bool)},
        {"is_causal": True},
    )
    for options, on in itertools.product(wrong, (False, True)):
        with torch_ext.enabled(on), pytest.raises((AssertionError, RuntimeError)):
            layer(x, x, x, need_weights=False, **options)
    with torch_ext.enabled(), pytest.raises((AssertionError, RuntimeError)):
        layer(x[..., :16], x[..., :16], x[..., :16], need_weights=False)


def test_fully_masked_rows_give_the_output_bias_and_no_nan():
    layer = make(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)
    padding = padding_mask()
    padding[1] = True
    with torch_ext.enabled():
        found = outputs_and_gradients(
            layer, lambda: layer(x, x, x, need_weights=False, key_padding_mask=padding), (x,)
        )
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert_same_but_for_rounding(found["output 0"][1], layer.out_proj.bias.expand(LENGTH, -1))


def test_a_frozen_or_tied_layer_and_checkpointing():
    layer = make(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED, requires_grad=True)
    layer.in_proj_weight.requires_grad_(False)
    compare_with_stock(layer, lambda: layer(x, x, x, need_weights=False), (x,))

    dropping = make(batch_first=True, dropout=0.3)

    def call():
        return dropping(x, x, x, need_weights=False)[0]

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(call, use_reentrant=False)

    with torch_ext.enabled():
        plain = outputs_and_gradients(dropping, call, (x,))
        again = outputs_and_gradients(dropping, checkpointed, (x,))
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


def test_scripting_still_works():
    layer = make(batch_first=True)
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = layer(x, x, x, need_weights=False)[0]
    with torch_ext.enabled():
        scripted = torch.jit.script(layer)
        out = scripted(x, x, x, need_weights=False)[0]
    assert_same_but_for_rounding(out, expected)
