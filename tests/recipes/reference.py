"""Models of libraries that are not packages, as small as they can be written: names and arithmetic.

Llama as in Meta's repository (llama/model.py), GPT-2 as in nanoGPT (model.py).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

EPS = 1e-5
THETA = 10_000.0


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours of a head as one complex number."""
    length, dim = x.shape[1], x.shape[-1]
    frequencies = THETA ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3)


class MetaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size, self.share = dim // heads, heads // groups
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, groups * self.size, bias=False)
        self.wv = nn.Linear(dim, groups * self.size, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, self.size)) for each in (self.wq, self.wk, self.wv))
        k, v = rotated(k).repeat_interleave(self.share, 2), v.repeat_interleave(self.share, 2)
        q, k, v = (each.transpose(1, 2) for each in (rotated(q), k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class MetaFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class MetaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.attention = MetaAttention(dim, heads, groups)
        self.feed_forward = MetaFeedForward(dim, 3 * dim)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    def __init__(self, words: int, dim: int, depth: int, heads: int, groups: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(words, dim)
        self.layers = nn.ModuleList(MetaBlock(dim, heads, groups) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, words, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(words)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class LinearAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class LinearMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))


class LinearBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), LinearAttention(dim, heads)
        self.ln_2, self.mlp = nn.LayerNorm(dim), LinearMLP(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LinearGPT(nn.Module):
    def __init__(self, words: int, positions: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(words, dim),
                "wpe": nn.Embedding(positions, dim),
                "h": nn.ModuleList(LinearBlock(dim, heads) for _ in range(depth)),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, words, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](words) + self.transformer["wpe"].weight[: words.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))
