"""Linear attention in the ways that papers' code writes it, in plain torch.

Every core is a module with ``attend(query, key, value)``, each [batch, heads, tokens, dim], which ``truth_linear``
records; ``causal`` says whether query i meets the keys up to i alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from attncompile.models.recipe import Built
from attncompile.models.weights import seed_weights
from attncompile.models.zoo.entry import Entry

_WIDTH, _HEADS, _TOKENS, _BATCH = 24, 3, 14, 2
_DIM = _WIDTH // _HEADS
_CAUSAL = ("cumulative", "outer", "retention", "triangle", "filled", "chunked", "unrolled", "summed")


class LinearCore(nn.Module):
    """phi(Q) (phi(K)^T V), spelled in the way that ``how`` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.causal = how, how in _CAUSAL

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, dim] three times -> [batch, heads, tokens, dim]."""
        result: torch.Tensor = getattr(self, "_" + self.how.replace("-", "_"))(query, key, value)
        return result

    def _elu(self, q: Any, k: Any, v: Any) -> Any:
        """Katharopoulos et al., 2020, with a sum of its own."""
        q, k, v = (functional.elu(q) + 1).transpose(1, 2), (functional.elu(k) + 1).transpose(1, 2), v.transpose(1, 2)
        state = torch.einsum("nshd,nshm->nhmd", k, v)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
        return torch.einsum("nlhd,nhmd,nlh->nlhm", q, state, z).transpose(1, 2)

    def _relu(self, q: Any, k: Any, v: Any) -> Any:
        q, k = q.relu(), k.relu()
        return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(2).unsqueeze(-1)).clamp(min=1e-4)

    def _ones(self, q: Any, k: Any, v: Any) -> Any:
        q, k, v = q.relu(), k.relu(), functional.pad(v, (0, 1), value=1.0)
        y = q @ (k.transpose(-1, -2) @ v)
        return y[..., :-1] / (y[..., -1:] + 1e-5)

    def _joined(self, q: Any, k: Any, v: Any) -> Any:
        q, k, v = q.exp(), k.exp(), torch.cat([v, torch.ones_like(v[..., :1])], -1)
        y = q @ (k.transpose(-1, -2) @ v)
        return y[..., :-1] / y[..., -1:]

    def _channels(self, q: Any, k: Any, v: Any) -> Any:
        """Channels before tokens, values times keys (EfficientViT, SANA)."""
        q, k, v = (t.transpose(-1, -2) for t in (q.relu(), k.relu(), v))
        v = functional.pad(v, (0, 0, 0, 1), value=1.0)
        y = (v @ k.transpose(-1, -2)) @ q
        return (y[:, :, :-1] / (y[:, :, -1:] + 1e-4)).transpose(-1, -2)

    def _efficient(self, q: Any, k: Any, v: Any) -> Any:
        """Shen et al., 2021: a softmax over the head dim of queries and over the tokens of keys."""
        q, k = q.softmax(-1) * _DIM**-0.5, k.softmax(-2)
        return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))

    def _random(self, q: Any, k: Any, v: Any) -> Any:
        """Performer, after its features: the normaliser multiplies."""
        inverse = 1.0 / torch.einsum("bhnd,bhd->bhn", q, k.sum(-2))
        return torch.einsum("bhde,bhnd,bhn->bhne", torch.einsum("bhnd,bhne->bhde", k, v), q, inverse)

    def _flat(self, q: Any, k: Any, v: Any) -> Any:
        b, h, n, d = q.shape
        q, k, v = q.relu().reshape(-1, n, d), k.relu().reshape(-1, n, d), v.reshape(-1, n, d)
        return torch.bmm(q, torch.bmm(k.transpose(1, 2), v)).view(b, h, n, d)

    def _float(self, q: Any, k: Any, v: Any) -> Any:
        q, k, w = q.relu().float(), k.relu().float(), v.float()
        return (q @ (k.transpose(-1, -2) @ w) / (q @ k.sum(2).unsqueeze(-1) + 1e-3)).to(v.dtype)

    def _cumulative(self, q: Any, k: Any, v: Any) -> Any:
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
        return torch.einsum("bhnd,bhnde->bhne", q, states) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)

    def _outer(self, q: Any, k: Any, v: Any) -> Any:
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
        return (q.unsqueeze(-1) * states).sum(-2)

    def _retention(self, q: Any, k: Any, v: Any) -> Any:
        """Sun et al., 2023: the parallel form, one decay a head."""
        position = torch.arange(q.shape[2])
        distance = (position[:, None] - position[None]).float()
        rate = (1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=torch.float32)))[:, None, None]
        decay = torch.where(distance >= 0, rate ** distance.clamp(min=0), torch.zeros(()))
        return ((q @ k.transpose(-1, -2) * _DIM**-0.5) * decay) @ v

    def _triangle(self, q: Any, k: Any, v: Any) -> Any:
        scores = (q.relu() @ k.relu().transpose(-1, -2)).tril()
        return scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v

    def _filled(self, q: Any, k: Any, v: Any) -> Any:
        n = q.shape[2]
        return (q @ k.transpose(-1, -2)).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), 0.0) @ v

    def _dot(self, q: Any, k: Any, v: Any) -> Any:
        """Wang et al., 2018: the dot product version of a non-local block."""
        return q @ k.transpose(-1, -2) / q.shape[2] @ v

    def _chunked(self, q: Any, k: Any, v: Any) -> Any:
        """Chunks of 7 tokens: each meets its own keys, and the sum of the states of the chunks before it."""
        b, h, n, d = q.shape
        q, k, v = (t.view(b, h, n // 7, 7, d) for t in (q, k, v))
        states = k.transpose(-1, -2) @ v
        before = functional.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        own = (q @ k.transpose(-1, -2)).tril() @ v
        return (own + q @ before).reshape(b, h, n, d)

    def _unrolled(self, q: Any, k: Any, v: Any) -> Any:
        """Retention in chunks of 4 tokens and a last one of 2: the state decays from chunk to chunk."""
        rate = (1 - 2.0 ** (-2 - torch.arange(q.shape[1], dtype=torch.float32)))[:, None, None]
        state = torch.zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
        parts = []
        for start in range(0, q.shape[2], 4):
            now, keys, values = (t[:, :, start : start + 4] for t in (q * _DIM**-0.5, k, v))
            n = now.shape[2]
            age = torch.arange(n, dtype=torch.float32)
            apart = (age[:, None] - age[None]).clamp(min=0)
            own = (now @ keys.transpose(-1, -2) * (rate**apart).tril()) @ values
            parts.append(own + (now * rate ** (age[:, None] + 1)) @ state)
            state = state * rate**n + (keys * rate ** (n - 1 - age[:, None])).transpose(-1, -2) @ values
        return torch.cat(parts, 2)

    def _summed(self, q: Any, k: Any, v: Any) -> Any:
        """Chunks of 7 tokens over a sum of the keys so far, which is kept beside the values as a channel of ones."""
        b, h, n, d = q.shape
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        q, k, v = (t.view(b, h, n // 7, 7, -1) for t in (q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1)))
        before = functional.pad((k.transpose(-1, -2) @ v).cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        y = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
        return (y[..., :-1] / (y[..., -1:] + 1e-6)).reshape(b, h, n, d)


class _Block(nn.Module):
    """Projections around a core, [batch, tokens, width]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.out, self.core = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH), LinearCore(how)
        self.register_buffer("directions", torch.randn(_DIM, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, _HEADS, _DIM).permute(2, 0, 3, 1, 4)
        if self.core.how == "random":
            q, k = (torch.exp(t @ self.directions - (t**2).sum(-1, keepdim=True) / 2) + 1e-4 for t in (q, k))
        out: torch.Tensor = self.out(self.core.attend(q, k, v).transpose(1, 2).reshape(b, n, c))
        return out


def attention(entry: Entry) -> Built:
    """``options``: ``how`` (the spelling)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((_BATCH, _TOKENS, _WIDTH), generator=generator)
    module = seed_weights(_Block(entry.options["how"]), 0)
    return Built(module, {"x": x}, ("output",), {"x": {0: "batch", 1: "sequence"}})


class MultiScale(nn.Module):
    """EfficientViT's multi-scale attention on [batch, channels, height, width]: heads of two scales are joined."""

    def __init__(self, width: int = 16, dim: int = 8) -> None:
        super().__init__()
        self.dim, self.core = dim, LinearCore("ones")
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.near = nn.Conv2d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False)
        self.mix = nn.Conv2d(3 * width, 3 * width, 1, groups=3 * width // dim, bias=False)
        self.out = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        qkv = self.qkv(x)
        both = torch.cat([qkv, self.mix(self.near(qkv))], dim=1)
        q, k, v = both.reshape(b, -1, 3 * self.dim, h * w).transpose(-1, -2).chunk(3, dim=-1)
        y = self.core.attend(q, k, v).transpose(-1, -2).reshape(b, -1, h, w)
        out: torch.Tensor = x + self.out(y)
        return out


def multi_scale(entry: Entry) -> Built:
    """No options."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((_BATCH, 16, 5, 7), generator=generator)
    return Built(seed_weights(MultiScale(), 0), {"x": x}, ("output",), {"x": {0: "batch"}})
