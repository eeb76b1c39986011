"""Torch modules for `chatglm.py`; apart from it because they cannot be defined without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from chatglm import Size


def causal_mask(queries: int, mask: Tensor) -> Tensor:
    """What to add to the scores, `[batch, 1, queries, keys]`: zero where a query may look.

    `mask` is one for real tokens, over all keys; the queries are the last positions of it.
    """
    keys = mask.shape[1]
    last = torch.arange(queries, device=mask.device) + (keys - queries)
    visible = torch.arange(keys, device=mask.device)[None, :] <= last[:, None]
    visible = visible[None, None] & (mask[:, None, None, :] > 0)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def angles(positions: Tensor, width: int) -> Tensor:
    """Rotary angles `[batch, 1, sequence, width / 2]` for `width` channels at integer positions."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return positions[:, None, :, None].float() * rates


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention2(nn.Module):
    """Multi-query attention, `[q|k|v]` in one matrix, rotary on the first half of each head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        width = (size.heads + 2 * size.groups) * size.head
        self.query_key_value = nn.Linear(size.hidden, width)
        self.dense = nn.Linear(size.heads * size.head, size.hidden, bias=False)

    def rotate(self, x: Tensor, angle: Tensor) -> Tensor:
        """Turn the pairs (0, 1), (2, 3), ... of the first half; pass the second half on."""
        turned, passed = x.split(self.size.head // 2, dim=-1)
        even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(3)
        return torch.cat((turned, passed), dim=-1)

    def forward(
        self, x: Tensor, mask: Tensor, angle: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = self.size
        batch, steps = x.shape[:2]
        widths = [size.heads * size.head, size.groups * size.head, size.groups * size.head]
        query, key, value = (
            part.view(batch, steps, -1, size.head).transpose(1, 2)
            for part in self.query_key_value(x).split(widths, dim=-1)
        )
        query, key = self.rotate(query, angle), self.rotate(key, angle)
        if past:
            key = torch.cat((past[0], key), dim=2)
            value = torch.cat((past[1], value), dim=2)

        repeat = size.heads // size.groups
        every_key, every_value = (
            kv[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(batch, size.heads, -1, size.head)
            for kv in (key, value)
        )
        scores = query @ every_key.transpose(2, 3) / math.sqrt(size.head) + mask
        mixed = scores.softmax(-1) @ every_value
        return self.dense(mixed.transpose(1, 2).reshape(batch, steps, -1)), key, value


class Mlp2(nn.Module):
    """SwiGLU with `[gate|up]` in one matrix."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(size.hidden, 2 * size.inner, bias=False)
        self.dense_4h_to_h = nn.Linear(size.inner, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block2(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(size.hidden)
        self.self_attention = Attention2(size)
        self.post_attention_layernorm = RmsNorm(size.hidden)
        self.mlp = Mlp2(size)

    def forward(
        self, x: Tensor, mask: Tensor, angle: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, key, value = self.self_attention(self.input_layernorm(x), mask, angle, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class Chat2(nn.Module):
    """The layout of ChatGLM2-6B and ChatGLM3-6B. Given a cache, it also returns the longer one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block2(size) for _ in range(size.layers))
        self.final_layernorm = RmsNorm(size.hidden)
        self.output_layer = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, *past: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        steps = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(steps, device=input_ids.device)[None]
        mask = causal_mask(steps, attention_mask)
        angle = angles(position_ids, self.size.head // 2)
        x = self.embedding(input_ids)
        present: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, key, value = layer(x, mask, angle, past[2 * number : 2 * number + 2])
            present += key, value
        logits = self.output_layer(self.final_layernorm(x))
        return (logits, *present) if past else logits


class Attention1(nn.Module):
    """Attention with q, k and v side by side per head, and a rotary for each position channel."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.query_key_value = nn.Linear(size.hidden, 3 * size.heads * size.head)
        self.dense = nn.Linear(size.heads * size.head, size.hidden)

    def rotate(self, x: Tensor, angle: Tensor) -> Tensor:
        """Turn channel i with channel i + half, within the half of a head that `angle` is for."""
        low, high = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def rotate_both(self, x: Tensor, text: Tensor, blank: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((self.rotate(first, text), self.rotate(second, blank)), dim=-1)

    def forward(self, x: Tensor, mask: Tensor, text: Tensor, blank: Tensor) -> Tensor:
        size = self.size
        batch, steps = x.shape[:2]
        fused = self.query_key_value(x).view(batch, steps, size.heads, 3 * size.head).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = self.rotate_both(query, text, blank), self.rotate_both(key, text, blank)
        scores = query @ key.transpose(2, 3) / math.sqrt(size.head) + mask
        mixed = scores.softmax(-1) @ value
        return self.dense(mixed.transpose(1, 2).reshape(batch, steps, -1))


class Block1(nn.Module):
    """Norm first, and a residual taken from the normed value, scaled up with the depth."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.scale = math.sqrt(2 * size.layers)
        self.input_layernorm = nn.LayerNorm(size.hidden)
        self.attention = Attention1(size)
        self.post_attention_layernorm = nn.LayerNorm(size.hidden)
        self.dense_h_to_4h = nn.Linear(size.hidden, size.inner)
        self.dense_4h_to_h = nn.Linear(size.inner, size.hidden)

    def forward(self, x: Tensor, mask: Tensor, text: Tensor, blank: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = self.scale * normed + self.attention(normed, mask, text, blank)
        normed = self.post_attention_layernorm(x)
        return self.scale * normed + self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(normed)))


class Chat1(nn.Module):
    """The layout of GLM-130B and ChatGLM-6B."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.word_embeddings = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block1(size) for _ in range(size.layers))
        self.final_layernorm = nn.LayerNorm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, block_position_ids: Tensor) -> Tensor:
        mask = causal_mask(input_ids.shape[1], torch.ones_like(input_ids))
        text = angles(position_ids, self.size.head // 2)
        blank = angles(block_position_ids, self.size.head // 2)
        x = self.word_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, mask, text, blank)
        return self.lm_head(self.final_layernorm(x))
