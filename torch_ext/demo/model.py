"""A small GPT on plain torch.nn: nothing in it knows of torch_ext."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryPositions(nn.Module):
    """Rotary position embedding of ``(batch, heads, seq, head_dim)`` queries and keys."""

    cos: Tensor  # (seq, head_dim / 2)
    sin: Tensor

    def __init__(self, head_dim: int, max_len: int) -> None:
        super().__init__()
        frequency = 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.outer(torch.arange(max_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention over ``(batch, seq, embed)``."""

    def __init__(self, embed_dim: int, heads: int, max_len: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.positions = RotaryPositions(embed_dim // heads, max_len)
        self.dropout = dropout
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for part in self.in_proj(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(
            self.positions(query),
            self.positions(key),
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, embed_dim: int, heads: int, max_len: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = CausalSelfAttention(embed_dim, heads, max_len, dropout)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * embed_dim, embed_dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Decoder-only transformer: tokens ``(batch, seq)`` to logits ``(batch, seq, vocabulary)``."""

    def __init__(
        self,
        vocabulary: int,
        max_len: int,
        layers: int,
        heads: int,
        embed_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.max_len = max_len
        self.token_embedding = nn.Embedding(vocabulary, embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, heads, max_len, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocabulary, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Every block adds two branches to the residual stream; keep its variance near 1.
                branch_end = name.endswith(("out_proj.weight", "mlp.2.weight"))
                std = 0.02 / math.sqrt(2 * layers) if branch_end else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, length: int, generator: torch.Generator, temperature: float = 0.7
) -> Tensor:
    """Continues ``prompt`` ``(seq,)`` by ``length`` sampled tokens; the result is on the CPU."""
    device = model.token_embedding.weight.device
    tokens = prompt.clone()
    was_training = model.training
    model.eval()
    for _ in range(length):
        context = tokens[-model.max_len :].unsqueeze(0).to(device)
        logits = model(context)[0, -1].float().cpu()
        following = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, following])
    model.train(was_training)
    return tokens
