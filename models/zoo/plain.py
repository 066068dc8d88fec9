"""Attention, and what only looks like it, written in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attncompile.models.recipe import Built
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry

_WIDTH, _HEADS, _TOKENS, _BATCH = 32, 4, 20, 2


def _built(module: nn.Module, *shapes: tuple[int, ...]) -> Built:
    generator = torch.Generator().manual_seed(1)
    inputs = {f"x{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    return Built(seed_weights(module, 0), inputs, ("output",), axes)


_X = (_BATCH, _TOKENS, _WIDTH)


class PlainAttention(nn.Module):
    """Self-attention whose core is one of several ways to write the same thing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads = how, _HEADS
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.sinks = nn.Parameter(torch.randn(_HEADS))

    def forward(self, x: torch.Tensor) -> Any:
        b, n, c = x.shape
        h, d = _HEADS, _WIDTH // _HEADS
        if self.how == "einsum":
            q, k, v = self.qkv(x).view(b, n, 3, h, d).unbind(2)
            p = torch.einsum("bihd,bjhd->bhij", q, k).mul(d**-0.5).softmax(-1)
            return self.out(torch.einsum("bhij,bjhd->bihd", p, v).reshape(b, n, c))
        q, k, v = self.qkv(x).view(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
        if self.how == "flat":
            q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
            y = torch.baddbmm(torch.zeros(b * h, n, n), q, k.transpose(1, 2), beta=0, alpha=d**-0.5).softmax(-1) @ v
            return self.out(y.view(b, h, n, d).transpose(1, 2).reshape(b, n, c))
        s = (q * d**-0.5) @ k.transpose(-2, -1)
        if self.how == "exp":
            e = torch.exp(s - s.amax(-1, keepdim=True))
            p = e / e.sum(-1, keepdim=True)
        elif self.how == "sinks":
            p = torch.cat([s, self.sinks.view(1, h, 1, 1).expand(b, h, n, 1)], -1).softmax(-1)[..., :-1]
        elif self.how == "softcap":
            p = (torch.tanh(s / 20.0) * 20.0).softmax(-1)
        elif self.how == "float":
            p = s.float().softmax(-1).to(v.dtype)
        elif self.how == "fill":
            p = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        else:
            p = s.softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(b, n, c))


def attention(entry: Entry) -> Built:
    return _built(PlainAttention(entry.options["how"]), _X)


class _Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        settings: dict[str, Any] = {"batch_first": True, "dropout": 0.0}
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, **settings)
        if kind == "encoder":
            self.layer: nn.Module = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 64, **settings)
        elif kind == "decoder":
            self.layer = nn.TransformerDecoderLayer(_WIDTH, _HEADS, 64, **settings)

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "encoder":
            return self.layer(x)
        if self.kind == "decoder":
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.layer(x, x[:, :12], tgt_mask=mask)
        if self.kind == "weights":
            out, weights = self.attention(x, x, x, need_weights=True)
            return out + weights.sum()
        return self.attention(x, x, x, need_weights=False)[0]


def torch_layer(entry: Entry) -> Built:
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no ONNX form
    return _built(_Layer(entry.options["kind"]), _X)


class _Grouped(nn.Module):
    """Grouped-query attention: two key heads for four query heads, repeated in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        d = _WIDTH // _HEADS
        self.q, self.kv = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 4 * d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        d = _WIDTH // _HEADS
        q = self.q(x).view(b, n, _HEADS, d).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 2, d).permute(2, 0, 3, 1, 4)
        if self.how == "enable_gqa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.how == "repeat_interleave":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (t[:, :, None].expand(b, 2, 2, n, d).reshape(b, 4, n, d) for t in (k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, n, _WIDTH)


def grouped(entry: Entry) -> Built:
    return _built(_Grouped(entry.options["how"]), _X)


class _Decode(nn.Module):
    """One token against a cache: x0 [batch, 1, width]; x1 and x2 [batch, heads, past, head dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, _HEADS, c // _HEADS).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, torch.cat([key, k], 2), torch.cat([value, v], 2))
        return y.transpose(1, 2).reshape(b, n, c)


def decode(entry: Entry) -> Built:
    cache = (_BATCH, _HEADS, 9, _WIDTH // _HEADS)
    return _built(_Decode(), (_BATCH, 1, _WIDTH), cache, cache)


class _Negative(nn.Module):
    """What must not be claimed: no queries that meet keys, or no values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.mix = nn.Linear(_WIDTH, 6), nn.Linear(_WIDTH, _WIDTH)
        self.codes = nn.Parameter(torch.randn(6, _WIDTH))
        self.experts = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "router":
            gates = self.gate(x).softmax(-1)
            outs = torch.stack([e(x) for e in self.experts], 2)
            return (gates[:, :, None] @ outs).squeeze(2)
        if self.kind == "codebook":
            return self.gate(x).softmax(-1) @ self.codes
        if self.kind == "pointer":
            return (self.mix(x) @ x.transpose(1, 2)).softmax(-1)
        if self.kind == "pooling":
            return x.softmax(1).mean(1, keepdim=True) * self.mix(x)
        if self.kind == "columns":
            q, k, v = (t.view(*x.shape[:2], 4, 8).transpose(1, 2) for t in (self.mix(x), x, x))
            return (q @ k.transpose(-2, -1)).softmax(-2) @ v
        if self.kind == "transposed-product":
            q, k, v = (t.view(*x.shape[:2], 4, 8).transpose(1, 2) for t in (self.mix(x), x, x))
            return (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v
        raise ValueError(self.kind)


def negative(entry: Entry) -> Built:
    return _built(_Negative(entry.options["kind"]), _X)


class _Neighbourhood(nn.Module):
    """2-D neighborhood attention written with a padded gather: every token's own keys, then products with one query."""

    index: torch.Tensor
    visible: torch.Tensor

    def __init__(self, side: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.side, self.window = _HEADS, side, window
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        near = torch.arange(side)[:, None] + torch.arange(window)[None]
        self.register_buffer("index", near, persistent=False)
        inside = (near >= window // 2) & (near < side + window // 2)
        visible = inside[:, None, :, None] & inside[None, :, None, :]
        self.register_buffer("visible", visible.reshape(side * side, 1, window * window), persistent=False)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[b, h, s * s, d] -> [b, h, s * s, w * w, d]."""
        b, h, n, d = x.shape
        s, w = self.side, self.window
        x = nn.functional.pad(x.reshape(b * h, s, s, d), (0, 0, w // 2, w // 2, w // 2, w // 2))
        x = x[:, self.index][:, :, :, self.index]  # [b * h, s, w, s, w, d]
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, n, w * w, d)

    def forward(self, x: torch.Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, _HEADS, c // _HEADS).permute(2, 0, 3, 1, 4)
        k, v = self._gathered(k), self._gathered(v)
        scores = (q * (c // _HEADS) ** -0.5)[..., None, :] @ k.transpose(-2, -1)
        weights = scores.masked_fill(~self.visible, float("-inf")).softmax(-1)
        return self.out((weights @ v)[..., 0, :].transpose(1, 2).reshape(b, n, c))


def neighbourhood(entry: Entry) -> Built:
    return _built(_Neighbourhood(5, 3), (_BATCH, 25, _WIDTH))


class _MaskedCross(nn.Module):
    """Mask2Former's cross-attention: queries see the pixels that their own predicted mask covers, or all of them."""

    def forward(self, queries: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        covered = (queries @ pixels.transpose(1, 2)).sigmoid() >= 0.5
        covered = covered | ~covered.any(-1, keepdim=True)
        q, k, v = (t.view(*t.shape[:2], _HEADS, -1).transpose(1, 2) for t in (queries, pixels, pixels))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=covered[:, None])
        return y.transpose(1, 2).flatten(2)


def masked_cross(entry: Entry) -> Built:
    return _built(_MaskedCross(), (_BATCH, 7, _WIDTH), _X)


class _Latents(nn.Module):
    """Perceiver IO: a few learned latents read the input, mix, and are read by the input's queries."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, _WIDTH))
        self.projections = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(9))

    def _attend(self, at: int, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.projections[at + i](x).view(*x.shape[:2], _HEADS, -1).transpose(1, 2)
            for i, x in enumerate((queries, tokens, tokens))
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + self._attend(0, latents, x)
        latents = latents + self._attend(3, latents, latents)
        return self._attend(6, x, latents)


def latents(entry: Entry) -> Built:
    return _built(_Latents(), _X)
