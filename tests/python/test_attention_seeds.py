"""Seeds: one draw a call with dropout, after every check, whatever the way in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import torch_ext

Call = Callable[..., Any]


def lower_right(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    bias = causal_lower_right(query.size(-2), key.size(-2))
    return torch_ext.scaled_dot_product_attention(query, key, value, bias, **options)


WAYS: dict[str, Call] = {
    "scaled_dot_product_attention": torch_ext.scaled_dot_product_attention,
    "attention_forward": torch_ext.attention_forward,
    "causal_lower_right": lower_right,
}


def refused(call: Call, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 3, 5, 8),
        "key": torch.randn(2, 3, 7, 8),
        "value": torch.randn(2, 3, 7, 8),
        "dropout_p": 0.5,
    } | changes
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="torch_ext::"):
        call(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", WAYS.values(), ids=WAYS)
def test_a_refused_call_draws_nothing(call: Call, requires_grad: bool) -> None:
    refused(call, value=torch.randn(2, 3, 6, 8, requires_grad=requires_grad))
    refused(call, query=torch.randn(2, 4, 5, 8, requires_grad=requires_grad))
    refused(call, key=torch.randn(2, 3, 7, 8).double())
    refused(call, dropout_p=1.5)
    refused(call, scale=float("nan"))
    freed = torch.randn(2, 3, 7, 8, requires_grad=requires_grad)
    freed.untyped_storage().resize_(0)
    refused(call, value=freed)


def test_a_refused_call_of_self_attention_draws_nothing() -> None:
    weights = torch.randn(24, 8), torch.randn(24), torch.randn(8, 8), torch.randn(8)
    x = torch.randn(2, 5, 8)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch_ext.self_attention(
            x, *weights, num_heads=2, attn_mask=torch.ones(5, 6), dropout_p=0.5
        )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("call", WAYS.values(), ids=WAYS)
def test_every_way_draws_the_same_seed(call: Call) -> None:
    """One draw, so that what follows in the generator's stream is the same too."""
    query, key, value = (torch.randn(1, 2, n, 8) for n in (5, 5, 5))
    torch.manual_seed(3)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    out = call(query, key, value, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), after)
    expected, _ = torch_ext.attention_forward(
        query,
        key,
        value,
        is_causal=call is lower_right,
        dropout_p=0.5,
        dropout_seed=seed,
    )
    assert torch.equal(out[0] if isinstance(out, tuple) else out, expected)


def test_a_given_seed_leaves_the_generator_alone() -> None:
    query = torch.randn(1, 2, 5, 8)
    state = torch.get_rng_state()
    torch_ext.attention_forward(query, query, query, dropout_p=0.5, dropout_seed=torch.tensor([3]))
    assert torch.equal(torch.get_rng_state(), state)


FIRST_COMPILATION = """
import torch
import torch_ext

query = torch.randn(1, 2, 5, 8)
mask = torch.ones(5, 5, dtype=torch.bool)
for call in (torch_ext.scaled_dot_product_attention, torch_ext.attention_forward):
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for _ in range(2):
        compiled(query, query, query, mask, dropout_p=0.5)
    assert len(graphs) == 1, (call, graphs)
"""


def test_the_first_compilation_of_a_process_is_kept() -> None:
    """Dynamo imports modules as it traces; that they are there now does not undo the graph."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_COMPILATION], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
